"""What each verb of the command line does, without parsing or printing."""

from collections.abc import Callable

Say = Callable[[str], None]
"""Told what happens, a line at a time."""
