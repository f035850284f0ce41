"""Proves the checker: reduced chaos finds each planted fault within three runs, and nothing without one.

Usage: ``python -m tests.chaos.planted [--clean RUNS] [NAME...]``. Each plant gets a process of its own.
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
from tests.chaos.checker import Verdict
from tests.chaos.plants import PLANTS
from tests.chaos.reduced import reduced
from tests.helpers import ROOT, quick_folder

RUNS = 3
ROW = "{:34} {:>5}  {:24} {}"


def one_run(url: str, seed: int) -> Verdict:
    """One run of reduced chaos."""
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=quick_folder()) as home:
        return asyncio.run(reduced(url, Path(home) / "run", seed=seed))


def try_plant(name: str, url: str) -> int:
    """Runs until it is found; 0 if it was. In this process, which is spoilt afterwards."""
    PLANTS[name]()
    for seed in range(RUNS):
        verdict = one_run(url, seed)
        if not verdict.ok:
            broken = ", ".join(sorted(verdict.broken()))
            print(ROW.format(name, seed + 1, broken, str(verdict.violations[0])[:100]))
            return 0
    print(ROW.format(name, "-", "NOT FOUND", verdict.figures))
    return 1


def clean(url: str, runs: int) -> list[str]:
    """Runs without a fault, each with a seed of its own; those in which something was found."""
    wrong = []
    for seed in range(runs):
        verdict = one_run(url, seed)
        print(ROW.format(f"no fault, seed {seed}", "", "" if verdict.ok else "WRONG", verdict), flush=True)
        wrong += [] if verdict.ok else [f"seed {seed}"]
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLANTS)}; all if not given")
    parser.add_argument("--clean", type=int, metavar="RUNS", help="instead: this many runs without a fault")
    parser.add_argument("--url", help="inner use: the server of the run")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PLANTS):
        parser.error(f"no such plants: {', '.join(sorted(unknown))}")
    if args.url:
        return try_plant(args.names[0], args.url)
    names = args.names or list(PLANTS)
    with tempfile.TemporaryDirectory(dir=quick_folder()) as home, EmbeddedServer(Path(home)) as server:
        if args.clean:
            return 1 if clean(server.url, args.clean) else 0
        print(ROW.format("planted fault", "runs", "broken", "first violation"), flush=True)
        missed = []
        for name in names:
            command = [sys.executable, "-m", "tests.chaos.planted", "--url", server.url, name]
            missed += [name] if subprocess.run(command, cwd=ROOT, check=False).returncode else []
    print(f"{len(names) - len(missed)} of {len(names)} found" + (f"; missed: {missed}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
