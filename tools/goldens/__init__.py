"""Reference numbers from PyTorch and transformers; only this room knows them, never jaxfm/.

They have an environment of their own, outside the repository:

    python3.11 -m venv ENV && ENV/bin/pip install -r tools/goldens/requirements.txt
"""
