"""Checks that combine several sections of a recipe."""
