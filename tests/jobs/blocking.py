"""Tasks whose bodies are files, in tests/jobs/files: for the tests of `subprocess=True`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core4 import task


@task(subprocess=True)
async def basic_blocking(a: int, b: int, c: int) -> Any:
    raise AssertionError("the body of a shell is never run")


@task(subprocess=True, retry_policy="never")
def other_name(*args: int, **kwargs: int) -> Any:
    """A shell that takes anything."""


@task(subprocess=True)
def unruly_file(what: str, ledger: str) -> Any: ...


@task(subprocess=True)
def says_nothing() -> Any: ...


@task(subprocess=True)
def spins(until: str) -> Any: ...


@task()
async def releases(path: str) -> None:
    """What `spins` waits for."""
    Path(path).touch()
