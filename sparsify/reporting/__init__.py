"""Shared presentation: tables, figures, page templates, numbers."""
