"""Computes reference values with PyTorch and transformers, which jaxfm/ never imports.

These scripts need an environment of their own, outside the repository:

    python3.11 -m venv ENV && ENV/bin/pip install -r tools/goldens/requirements.txt
"""
