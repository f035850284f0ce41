"""A process that forks one process per case of the crash matrix: usage `python -m tests.chaos.actor`.

It reads cases from stdin, one JSON object a line, and prints for each how its process ended: minus the
number of the signal, or the exit code. It forks before any client or thread exists, so that a case costs
milliseconds and is yet a real process that dies a real death.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from core4 import faults
from core4.faults import Faults
from tests.chaos.client import Actor, fast_settings
from tests.chaos.evidence import opened
from tests.chaos.scenarios import SCENARIOS
from tests.database import PatientDatabase


async def play(case: dict[str, Any], watched: Faults | None = None) -> list[list[Any]]:
    """Prepare in peace, arm, act; the writes that were made while armed. The caller may watch them."""
    scenario = SCENARIOS[case["scenario"]]
    home = Path(case["home"])
    with faults.armed(watched or Faults()) as armed, opened(home / "history") as history:
        database = await PatientDatabase.connect(
            case["url"], case["database"], find_and_modify=scenario.find_and_modify
        )
        settings = fast_settings(case["url"], case["database"], home)
        actor = Actor(database, settings, history, home / "ledger")
        await actor.prepare()
        if scenario.register:
            await actor.register()
        await scenario.prepare(actor)
        await database.landed()
        armed.trace.clear()
        wanted = Faults.parse(case["fault"])
        wanted.plant()
        armed.rules.extend(wanted.rules)
        try:
            await scenario.act(actor)
        except Exception as error:  # a client that gives up
            print(f"{case['scenario']}: {error!r}", file=sys.stderr)
        await database.landed()
        trace = [list(hit) for hit in armed.trace]
        await database.close()
        return trace


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            asyncio.run(play(json.loads(line)))
            sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
