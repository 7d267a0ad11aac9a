"""Preferences: a source of pairs, or of chats with labels, with log-probs under a reference."""
