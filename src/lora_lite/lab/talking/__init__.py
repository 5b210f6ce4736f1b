"""Talking to what was trained: its file and base, the history as a prompt, replies as they come."""
