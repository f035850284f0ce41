"""Proves the checker: each planted fault is found within three runs of reduced chaos.

Usage: ``python -m tests.chaos.planted [NAME...]``. Each plant gets a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core4.embedded import EmbeddedServer
from tests.chaos.plants import PLANTS
from tests.chaos.reduced import reduced
from tests.helpers import ROOT

RUNS = 3


def try_plant(name: str, url: str) -> int:
    """Runs until it is found; 0 if it was. In this process, which is spoilt afterwards."""
    logging.disable(logging.ERROR)
    if name:
        PLANTS[name]()
    for seed in range(RUNS):
        with tempfile.TemporaryDirectory() as home:
            verdict = asyncio.run(reduced(url, Path(home) / "run", seed=seed))
        if not verdict.ok:
            print(f"{name}: found in run {seed + 1}: {sorted(verdict.broken())}: {verdict.violations[0]}")
            return 0
    print(f"{name}: NOT FOUND in {RUNS} runs; {verdict.figures}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PLANTS))
    parser.add_argument("--url", help="inner use: the server of the run")
    args = parser.parse_args(argv)
    if args.url:
        return try_plant(args.names[0], args.url)
    missed = []
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home)) as server:
        for name in args.names:
            command = [sys.executable, "-m", "tests.chaos.planted", "--url", server.url, name]
            missed += [name] if subprocess.run(command, cwd=ROOT, check=False).returncode else []
    print(
        f"{len(args.names) - len(missed)} of {len(args.names)} found"
        + (f"; missed: {missed}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
