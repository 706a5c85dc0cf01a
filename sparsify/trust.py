"""The user's word on code that somebody else wrote, and what such code gets from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

TRUST = "SPARSIFY_TRUST_CODE"
"""Environment variable with the user's word for the processes that a command starts. A file that is read never sets it."""
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH)(_|S$|$)|^(AWS|AZURE)_",
    re.IGNORECASE,
)


def trust_code() -> None:
    """Records the user's word: `--trust-code`."""
    os.environ[TRUST] = "1"


def code_is_trusted() -> bool:
    return os.environ.get(TRUST) == "1"


def forget_secrets() -> None:
    """Removes tokens, keys and passwords from the environment of this process, and of those that it starts from now on."""
    for name in os.environ.keys() - without_secrets(os.environ).keys():
        del os.environ[name]


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without tokens, keys and passwords, as their names tell them."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}
