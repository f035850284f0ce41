"""SIGKILL before and after every write there is, and its reply lost: another process makes it good.

The cells are made from the writes that a scenario was seen to make; a write in the source that no scenario
makes fails the matrix. Where nothing that lasts happens between two writes, being killed after the one is
being killed before the other, and one cell shows both.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bson import ObjectId

from core4 import states
from core4.database import Database
from core4.faults import Hit
from core4.jobs import Job
from core4.store import JobStore
from core4.transitions import Change
from tests.chaos.actor import play
from tests.chaos.forge import Cell, Forge, Watch, judged
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.sites import writes

pytestmark = pytest.mark.asyncio

PARALLEL = 2
Seen = list[tuple[Hit, bool]]  # a write, and whether being killed before it is a case of its own
SEEN: dict[str, Seen] = {}
MOVES: set[str] = set()  # that the scenarios seen so far have made


@pytest.fixture(scope="module", autouse=True)
def moves_noted() -> Iterator[None]:
    """What is written through `JobStore.cas` and `cas_many` is noted in `MOVES`."""
    write, write_many = JobStore.cas, JobStore.cas_many

    async def noted(self: JobStore, seen: Job, change: Change) -> Job | None:
        MOVES.add(change.move)
        return await write(self, seen, change)

    async def noted_many(self: JobStore, wishes: Sequence[tuple[Job, Change]]) -> dict[ObjectId, Job]:
        MOVES.update(change.move for _, change in wishes)
        return await write_many(self, wishes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobStore, "cas", noted)
        patch.setattr(JobStore, "cas_many", noted_many)
        yield


@pytest.fixture(scope="module")
def forges() -> Iterator[list[Forge]]:
    """As many makers of processes as may work at the same time."""
    every = [Forge() for _ in range(PARALLEL)]
    yield every
    for forge in every:
        forge.stop()


async def seen(scenario: str, url: str, home: Path) -> Seen:
    """The writes that a scenario makes when nothing goes wrong."""
    if scenario not in SEEN:
        name = f"test_{uuid.uuid4().hex[:16]}"
        case = {"scenario": scenario, "fault": "", "url": url, "database": name, "home": str(home)}
        watch = Watch(home)
        hits = [Hit(*hit) for hit in await play(case, watch)]
        SEEN[scenario] = list(zip(hits, watch.fresh[-len(hits) :], strict=True))
        await dropped(url, name)
    return SEEN[scenario]


async def dropped(url: str, name: str) -> None:
    database = await Database.connect(url, name)
    await database.drop()
    await database.close()


def cells_of(scenario: str, seen: Seen) -> list[Cell]:
    counts: Counter[str] = Counter()
    cells = []
    for hit, fresh in seen:
        counts[hit.site] += 1
        verbs = ("kill before", "kill after", "lose") if fresh else ("kill after", "lose")
        cells += [Cell(scenario, f"{verb} {hit.site} {counts[hit.site]}") for verb in verbs]
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


async def test_every_move_has_its_cells(mongo_url: str, tmp_path: Path) -> None:
    """All moves of a job go through one write: a move that no scenario makes has no crash point, either."""
    for scenario in SCENARIOS:
        await seen(scenario, mongo_url, tmp_path)

    # Progress is a write of its own.
    assert set(states.MOVES) - MOVES == {"progress"}


async def test_every_write_has_its_cells(mongo_url: str, tmp_path: Path) -> None:
    """A write in the source that no scenario makes has no crash point: write a scenario for it."""
    hits = [hit for scenario in SCENARIOS for hit, _ in await seen(scenario, mongo_url, tmp_path)]

    assert set(writes()) - set(hits) == set()
