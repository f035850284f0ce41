"""Processes that die at a named write, and the judgement of what a healthy one makes of what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from core4.database import Database
from core4.faults import Faults, Hit
from tests.chaos.checker import check
from tests.chaos.client import Actor, fast_settings
from tests.chaos.evidence import opened
from tests.chaos.recovery import all_told, bury_others, gathered, recover
from tests.chaos.scenarios import SCENARIOS
from tests.helpers import ROOT

T = TypeVar("T")


class Watch(Faults):
    """No faults; for each write, whether anything that outlives a process was done since the one before.

    If not, being killed before the one is being killed after the other. ``home`` has the notes that are
    taken outside of the database.
    """

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.fresh: list[bool] = []
        self._home = home
        self._open = 0
        self._told = -1  # bytes of notes after the last write

    async def perform(self, hit: Hit, write: Callable[[], Awaitable[T]]) -> T:
        """Make the write."""
        self.fresh.append(not self.trace or self._open > 0 or self._noted() != self._told)
        self._open += 1
        try:
            return await super().perform(hit, write)
        finally:
            self._open -= 1
            self._told = self._noted()

    def _noted(self) -> int:
        return sum(path.stat().st_size for path in self._home.iterdir() if path.is_file())


@dataclass(frozen=True)
class Cell:
    """One fault at one write of one scenario."""

    scenario: str
    fault: str


class Forge:
    """One process that makes the processes that die."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.actor"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, cell: Cell, url: str, database: str, home: Path) -> int:
        """How the process of this cell ended."""
        case = {**asdict(cell), "url": url, "database": database, "home": str(home)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.communicate()


async def judged(cell: Cell, url: str, name: str, home: Path) -> str | None:
    """What is wrong after a healthy process has recovered what the cell left; drops the database."""
    scenario = SCENARIOS[cell.scenario]
    database = await Database.connect(url, name)
    try:
        with opened(home / "history") as history:
            actor = Actor(database, fast_settings(url, name, home), history, home / "ledger")
            await bury_others(actor)
            await actor.register()
            if scenario.repeat:
                await scenario.act(actor)
            await recover(actor)
            await scenario.proof(actor)
            await database.landed()
            await all_told(actor)
        verdict = check(await gathered(database, home / "history", home / "ledger", pauses=scenario.overlaps))
        return None if verdict.ok else str(verdict)
    except AssertionError as error:
        return str(error)
    finally:
        await database.drop()
        await database.close()
