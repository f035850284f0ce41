"""`make bench`: medians and ratios to a floor that is measured in the same, interleaved run.

Floors are bare loops of the driver, bare forks and bare handlers. Runs against `CORE4_MONGO_URL`, in a
database of its own; without, on the embedded server of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.engine import SLOTS, Engine
from tests.bench.probes import Goal, figures, table
from tests.bench.rivals import Rival, rivals, versions
from tests.bench.server import server

Document = dict[str, Any]


async def measure(goals: Sequence[Goal], repetitions: int) -> None:
    """All figures, one after the other, and again."""
    for number in range(repetitions):
        print(f"repetition {number + 1} of {repetitions}", flush=True)
        for figure in figures(goals):
            start = time.monotonic()
            await figure.repeat()
            took = time.monotonic() - start
            print(f"  {figure.name}: {figure.repetitions[-1] * 1000:.3f} ms, in {took:.0f} s", flush=True)


async def bench(options: argparse.Namespace, url: str, peers: Mapping[str, Rival]) -> Document:
    """The whole run; rows and facts."""
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
        engine = Engine(url, options.depth, options.drain, home)
        await engine.begin(stack)
        known = [*engine.goals(), *engine.peer_goals(peers)]
        goals = [goal for goal in known if not options.goal or goal.number in options.goal]
        await measure(goals, options.repetitions)
        return {
            "rows": [goal.row() for goal in goals],
            "idle_calls": await engine.idle_calls(),
            "memory": await engine.memory(),
        }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--repetitions", type=int, default=5, help="5 or more for figures to quote (default: 5)"
    )
    parser.add_argument("--depth", type=int, default=5_000, help="jobs that wait at goal 2 (default: 5000)")
    parser.add_argument(
        "--drain",
        type=int,
        default=400,
        help="inline jobs of one drain, and a quarter in processes (default: 400)",
    )
    parser.add_argument("--goal", action="append", help="only this one; may be repeated")
    parser.add_argument("--peers", action="store_true", help="beside other job systems, too (--goal peer)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if options.drain < 40:
        parser.error("--drain: fewer than 40 say nothing")
    # Else each fresh interpreter compiles the product again, which an installed one never does.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with ExitStack() as stack:
        url, about = server(stack)
        facts: Document = {**about, "repetitions": options.repetitions, "drain": options.drain}
        peers: dict[str, Rival] = {}
        if options.peers:
            peers, facts["skipped_peers"] = rivals(stack, SLOTS, options.drain)
            facts["peers"] = versions()
        facts |= uvloop.run(bench(options, url, peers))
    print(f"\n{facts['server']}; medians of {facts['repetitions']} repetitions; {facts['cores']} cores")
    print(table(facts["rows"]))
    print(f"goal 8, idle calls of a worker: {facts['idle_calls']}")
    print(f"goal 15, idle worker: {facts['memory']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
