from __future__ import annotations

import os

from core4 import subprocess
from core4.context import current


@subprocess
def spin(until: str) -> int:
    """Keep the interpreter to itself until another job has written a file."""
    context, count = current(), 0
    assert context is not None
    context.report(0.5, "round and round")
    while not os.path.exists(until):
        count += 1
    return count


if __name__ == "__main__":
    spin()
