"""What the benchmarks make of what they measure; nothing is timed here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.fit import fitted, predicted, solve
from tests.bench.model import GRID, PARTS, TERMS, UNSEEN, Load, Point, model_of, rows
from tests.bench.outage import verdict
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


def test_a_fit_finds_the_costs_that_the_points_were_made_of() -> None:
    costs = {"second": 0.01, "job": 0.5}
    counts = [{"second": second, "job": job} for second, job in ((10.0, 0.0), (10.0, 20.0), (30.0, 5.0))]
    found = fitted([(each, predicted(costs, each)) for each in counts], list(costs), least=0.1)
    assert found == pytest.approx(costs)


def test_nothing_costs_less_than_nothing() -> None:
    points = [({"a": 1.0, "b": 0.0}, 1.0), ({"a": 1.0, "b": 1.0}, 0.9), ({"a": 2.0, "b": 0.0}, 2.0)]
    found = fitted(points, ["a", "b"], least=0.1)
    assert found["b"] == 0.0
    assert 0.9 < found["a"] < 1.0


def test_terms_that_always_occur_together_are_refused() -> None:
    with pytest.raises(ValueError, match="apart"):
        solve([[1.0, 2.0], [2.0, 4.0]], [1.0, 2.0])


def test_the_grid_tells_all_terms_apart_and_predicts_what_is_not_in_it() -> None:
    costs = {part: {term: 0.001 * (n + 1) for n, term in enumerate(TERMS[part])} for part in PARTS}

    def point(load: Load) -> Point:
        seconds = load.seconds + 3.0
        used = {part: predicted(costs[part], load.counts(seconds)) for part in PARTS}
        return Point(load, seconds, 0.002, used, unseen=load in UNSEEN)

    points = [point(load) for load in (*GRID, *UNSEEN)]
    model = model_of(points)
    unseen = [row for row in rows(model, points) if row["unseen"]]
    assert len(unseen) == 3 * len(PARTS)
    assert all(abs(row["error"]) < 0.001 for row in unseen)


def test_an_outage_is_judged_by_what_was_acknowledged() -> None:
    def row(key: str, n: int, *states: str, trial: int = 1) -> dict[str, object]:
        history = [{"state": state} for state in states]
        return {"_id": key, "args": {"n": n}, "state": states[-1], "history": history, "trial": trial}

    journal = [
        row("a", 1, "pending", "running", "complete"),
        row("b", 2, "pending", "error"),
        row("c", 3, "running", "complete"),
        row("d", 3, "running", "complete"),
        row("e", 9, "pending", "complete"),  # nobody was told of it
    ]
    found = verdict({"a": 1, "b": 2, "c": 3, "gone": 4}, journal, 0)
    assert (found["lost"], found["incomplete"], found["journal"]) == (1, 1, 5)
    assert found["twice"] == 1  # c and d did the same
