"""Tokens, drawn into sequences with exact token shares."""
