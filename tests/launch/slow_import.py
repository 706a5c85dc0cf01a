"""A child that is long busy before its program begins, as a rank with its imports: it writes a line every 10 ms."""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    with Path(sys.argv[1]).open("a") as file:
        for number in range(3_000):
            file.write(f"{number}\n")
            file.flush()
            time.sleep(0.01)
