"""What job bodies write outside of the product. Loads nothing but the interpreter."""

from __future__ import annotations

import os
import time


def note(path: str, what: str, job: str, attempt: int, token: str) -> None:
    """Append one line to a ledger; it is on the disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, f"{what} {job} {attempt} {token} {os.getpid()} {time.time()}\n".encode())
        os.fsync(handle)
    finally:
        os.close(handle)
