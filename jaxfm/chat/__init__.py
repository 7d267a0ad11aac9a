"""Chats: rendering conversations with a template and finding the assistant's part of the text."""
