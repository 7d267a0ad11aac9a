"""Chats."""

TEMPLATES = {}


def read_template(name: str) -> str:
    return TEMPLATES[name] if name else ''
