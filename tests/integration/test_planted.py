"""The checker finds faults in the engine: planted in a process, which then meets what the fault is about.

The whole table of planted faults, each under reduced chaos, takes minutes: `make planted`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.forge import Cell, Forge, judged
from tests.chaos.plants import PLANTS

pytestmark = pytest.mark.asyncio

# The scenario, what happens in it to the process or its writes, and the promise that is broken then.
FOUND = {
    "answer_before_insert": ("enqueue", "kill before store:insert:insert_one", "C1"),
    "blind_retry_of_an_enqueue": ("enqueue", "lose tests.chaos.plants:insert:insert_one", "C3"),
    "delete_before_journal": ("finish-complete", "kill after tests.chaos.plants:move:delete_one", "C1"),
    "finish_without_the_lease": ("finish-stale", "", "C5"),
    "no_tombstone_check": ("start-of-a-leftover", "", "C6"),
    "random_child_id": ("restart-error", "kill before store:cas:update_one 2", "C2"),
    "rescue_forgets_the_kill": ("rescue-killing", "", "C13"),
    "restart_deletes_the_parent_first": (
        "restart-error",
        "kill after tests.chaos.plants:restart:delete_one",
        "C1",
    ),
    "unfenced_progress": ("progress-stale", "", "C5"),
}


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    """One maker of processes for all of them."""
    forge = Forge()
    yield forge
    forge.stop()


@pytest.mark.parametrize("plant", FOUND)
async def test_a_planted_fault_is_found(plant: str, forge: Forge, mongo_url: str, tmp_path: Path) -> None:
    """With the fault the checker names the broken promise; without it, all else alike, it is content."""
    scenario, fault, promise = FOUND[plant]
    assert plant in PLANTS
    verdicts = []
    for planted in (f"plant tests.chaos.plants:{plant}", ""):
        cell = Cell(scenario, "; ".join(filter(None, (planted, fault))))
        name = f"test_{uuid.uuid4().hex[:16]}"
        home = tmp_path / name
        home.mkdir()
        await asyncio.to_thread(forge.run, cell, mongo_url, name, home)
        verdicts.append(await judged(cell, mongo_url, name, home))

    assert verdicts[1] is None
    assert f"{promise} " in (verdicts[0] or ""), verdicts[0]
