"""SIGKILL before and after every write there is, and its reply lost: another process makes it good.

The cells are made from the writes that a scenario was seen to make; a write in the source that no scenario
makes fails the matrix.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from core4.database import Database
from core4.faults import Hit
from tests.chaos.actor import play
from tests.chaos.checker import check
from tests.chaos.client import Actor, fast_settings
from tests.chaos.evidence import opened
from tests.chaos.recovery import bury_others, gathered, recover
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.sites import writes
from tests.helpers import ROOT

pytestmark = pytest.mark.asyncio

PARALLEL = 2
VERBS = ("kill before", "kill after", "lose")
SEEN: dict[str, list[Hit]] = {}


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


@pytest.fixture(scope="module")
def forges() -> Iterator[list[Forge]]:
    """As many makers of processes as may work at the same time."""
    every = [Forge() for _ in range(PARALLEL)]
    yield every
    for forge in every:
        forge.stop()


async def seen(scenario: str, url: str, home: Path) -> list[Hit]:
    """The writes that a scenario makes when nothing goes wrong."""
    if scenario not in SEEN:
        name = f"test_{uuid.uuid4().hex[:16]}"
        case = {"scenario": scenario, "fault": "", "url": url, "database": name, "home": str(home)}
        SEEN[scenario] = [Hit(*hit) for hit in await play(case)]
        await dropped(url, name)
    return SEEN[scenario]


async def dropped(url: str, name: str) -> None:
    database = await Database.connect(url, name)
    await database.drop()
    await database.close()


def cells_of(scenario: str, hits: list[Hit]) -> list[Cell]:
    counts: Counter[str] = Counter()
    cells = []
    for hit in hits:
        counts[hit.site] += 1
        cells += [Cell(scenario, f"{verb} {hit.site} {counts[hit.site]}") for verb in VERBS]
    return cells


async def try_cells(cells: Sequence[Cell], forge: Forge, url: str, home: Path) -> list[str]:
    """Let a process die in each of these cells, recover, judge; what is wrong then."""
    wrong = []
    for cell in cells:
        name = f"test_{uuid.uuid4().hex[:16]}"
        place = home / name
        place.mkdir()
        code = await asyncio.to_thread(forge.run, cell, url, name, place)
        wanted = -signal.SIGKILL if cell.fault.startswith("kill") else 0
        found = f"ended with {code}" if code != wanted else await judged(cell, url, name, place)
        wrong += [f"{cell}: {found}"] if found else []
    return wrong


async def judged(cell: Cell, url: str, name: str, home: Path) -> str | None:
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
        verdict = check(await gathered(database, home / "history", home / "ledger"))
        return None if verdict.ok else str(verdict)
    except AssertionError as error:
        return str(error)
    finally:
        await database.drop()
        await database.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_another_process_makes_it_good(
    scenario: str, mongo_url: str, forges: list[Forge], tmp_path: Path
) -> None:
    """No job lost, one outcome, everything final, whichever write the process died at."""
    cells = cells_of(scenario, await seen(scenario, mongo_url, tmp_path))
    runs = (try_cells(cells[n::PARALLEL], forge, mongo_url, tmp_path) for n, forge in enumerate(forges))

    wrong = [each for run in await asyncio.gather(*runs) for each in run]
    assert cells
    assert not wrong, "\n".join(wrong)


async def test_every_write_has_its_cells(mongo_url: str, tmp_path: Path) -> None:
    """A write in the source that no scenario makes has no crash point: write a scenario for it."""
    hits = [hit for scenario in SCENARIOS for hit in await seen(scenario, mongo_url, tmp_path)]

    assert set(writes()) - set(hits) == set()
