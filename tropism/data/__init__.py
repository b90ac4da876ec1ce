"""Prompts now; preferences and the store later."""
