"""What the benchmarks make of what they measure; nothing is timed here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.peers.mark import MARKS, mark, marks
from tests.bench.probes import Figure, Goal, middle, table
from tests.bench.rivals import KINDS, Rival, rivals, versions


async def nothing() -> Sequence[float]:
    return [1.0]


def figure(name: str, *seconds: float) -> Figure:
    return Figure(name, nothing, repetitions=list(seconds))


@pytest.fixture
def rival(tmp_path: Path) -> Rival:
    return Rival(KINDS["rq"], Path("python"), slots=2, drained=400, home=tmp_path)


def test_the_middle_of_a_drain_knows_neither_its_start_nor_its_tail() -> None:
    ended = [1000.0] * 20 + [2000.0 + number for number in range(75)] + [2075.0] * 5
    assert middle(ended[::-1]) == 1.0


def test_a_goal_beside_a_peer_is_told_in_the_direction_in_which_it_is_wanted() -> None:
    own, peer = figure("own", 2.0, 2.0, 4.0), figure("peer", 4.0, 1.0, 4.0)
    drained, idle = Goal("peer", own, peer, 1.0), Goal("peer", own, peer, 1.0, by="time")
    assert drained.ratios == [2.0, 0.5, 1.0]
    assert idle.ratios == [0.5, 2.0, 1.0]
    assert drained.met
    assert idle.met


def test_a_row_without_a_goal_is_shown_and_never_missed() -> None:
    row = Goal("peer", figure("own", 9.0), figure("peer", 1.0), None).row()
    assert row["met"]
    assert "no" not in table([row]).splitlines()[1].split()


def test_each_body_leaves_one_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "marks"
    monkeypatch.setenv(MARKS, str(file))
    assert marks(file) == []
    mark()
    mark()
    first, second = marks(file)
    assert first <= second


async def test_a_job_that_left_no_mark_or_two_fails_the_run(
    rival: Rival, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKS, str(rival.file))
    mark()
    with pytest.raises(TimeoutError, match="1 of 2"):
        await rival.marked(2, patience=0.0)
    mark()
    with pytest.raises(AssertionError, match="2 marks of 1"):
        await rival.marked(1, patience=0.0)


def test_a_service_that_is_not_there_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: Rival, what: str, number: int = 0) -> str:
        if self.kind is KINDS["rq"]:
            raise RuntimeError("RQ: open:\nConnection refused")
        asked.append((self.kind.module, what))
        return ""

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(Rival, "ask", ask)
    monkeypatch.setattr("tests.bench.rivals.environment", lambda: Path("python"))
    with ExitStack() as stack:
        found, skipped = rivals(stack, slots=2, drained=400)
    assert list(found) == ["celery", "procrastinate"]
    assert skipped == {"rq": "Connection refused"}
    assert {what for _, what in asked} == {"open", "clear"}


def test_all_peers_are_pinned() -> None:
    assert all("==" in line for line in versions())
