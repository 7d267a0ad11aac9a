"""Corpora: the documents of a source, tokenised once and kept in a cache on disk."""
