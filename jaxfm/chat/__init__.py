"""Chats: conversations as text by a template, and which part of it the assistant says."""
