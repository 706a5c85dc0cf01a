"""The user-error tree.

A `UserError` is somebody's mistake outside this code: a path, a setting, a file's content. Its message
says what was given, what is allowed and what to do next; the command line prints it without a traceback
and exits with 2. Everything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """A mistake that the user can fix.

    Args:
        given: What was found, with its name or path and value.
        allowed: What would have been accepted.
        next_step: What to do now: a command, a setting or a file to change.
    """

    def __init__(self, given: str, *, allowed: str = "", next_step: str = "") -> None:
        self.given, self.allowed, self.next_step = given, allowed, next_step
        super().__init__("\n".join(part for part in (given, allowed, next_step) if part))

    def to_json(self) -> dict[str, str]:
        """What another process needs to raise the same error."""
        return {
            "class": type(self).__name__,
            "given": self.given,
            "allowed": self.allowed,
            "next_step": self.next_step,
        }

    @staticmethod
    def from_json(record: Mapping[str, str]) -> UserError:
        classes = {kind.__name__: kind for kind in (UserError, *UserError.__subclasses__())}
        return classes[record["class"]](record["given"], allowed=record["allowed"], next_step=record["next_step"])


class RecipeError(UserError):
    """A recipe, an override or a combination of settings that cannot work."""


class ModelError(UserError):
    """A checkpoint that is missing, damaged or of an architecture that cannot be held."""


class MixtureError(UserError):
    """A mixture, a source or a tokenizer that cannot supply the training tokens."""


class RunError(UserError):
    """A run folder in a state that the command cannot continue from."""


class ExportError(UserError):
    """A bundle that cannot be written, or that failed its own acceptance check."""


class EvaluationError(UserError):
    """A suite, a task or evaluation data that cannot be measured with."""


class StorageError(UserError):
    """A disk or a folder that refused to be written."""


def nearest(word: str, names: Iterable[str]) -> str:
    """Returns "Did you mean 'x'? " for the closest of `names`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


def bound(value: float) -> str:
    """A bound of a number, as messages say it: 1,000,000 whether it is an integer or not."""
    return f"{int(value):,}" if value == int(value) else f"{value:,}"


def check_choice(key: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is none of those allowed.

    Raises:
        RecipeError: With the nearest allowed value.
    """
    if value not in allowed:
        raise RecipeError(
            f"{key} is {value!r}.",
            allowed=f"{nearest(str(value), allowed)}Allowed: {', '.join(allowed)}.",
            next_step=f"Set {key}={allowed[0]}, for example.",
        )
