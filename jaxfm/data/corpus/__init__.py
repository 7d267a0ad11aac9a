"""Corpora: the documents of a source, tokenised once and cached on disk."""
