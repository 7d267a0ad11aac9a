"""Runs: one resolved config and one work directory, and every part that is built from them."""
