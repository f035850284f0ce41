"""A file that forgets to call its function."""

from __future__ import annotations

from core4 import subprocess


@subprocess
def work() -> None: ...
