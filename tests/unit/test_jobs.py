"""The words of a job: order, identity and what readers get. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from core4 import jobs
from core4.jobs import Job, JobOrder
from core4.options import DEFAULTS, OPTIONS, PRIORITY_LIMIT, Rate, problem
from core4.retries import Outcome, decide
from core4.states import FINAL, MOVES, STOPPED, WAITING, State, highstate
from core4.store import readable

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)

priorities = st.integers(-PRIORITY_LIMIT, PRIORITY_LIMIT)
times = st.datetimes(datetime(2025, 1, 1), datetime(2060, 1, 1), timezones=st.just(UTC))
lines = st.tuples(st.booleans(), priorities, times)


def make_job(**options: Any) -> Job:
    document = jobs.new_document(JobOrder(name="t.Job", options=options), ObjectId(), NOW)
    return Job.from_document({**document, "state": "running", "killed_at": None})


@given(lines, lines)
def test_rank_orders_by_force_then_priority_then_time(
    a: tuple[bool, int, datetime], b: tuple[bool, int, datetime]
) -> None:
    """The one number sorts as the three would, and fits into an int64."""
    ranks = [jobs.rank(force=force, priority=priority, at=at) for force, priority, at in (a, b)]
    keys = [(not force, -priority, at) for force, priority, at in (a, b)]
    assert (ranks[0] < ranks[1]) == (keys[0] < keys[1])
    assert all(0 <= rank < 2**63 for rank in ranks)
    assert [rank < jobs.FORCED_BELOW for rank in ranks] == [a[0], b[0]]


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_key_does_not_depend_on_the_order_of_arguments(args: dict[str, Any]) -> None:
    """Equal arguments, equal key; other arguments or another name, another key."""
    turned = dict(reversed(list(args.items())))
    assert jobs.unique_key("a", args) == jobs.unique_key("a", turned)
    assert jobs.unique_key("a", args) != jobs.unique_key("b", args)
    assert jobs.unique_key("a", {**args, "one more": 1.5}) != jobs.unique_key("a", args)


def test_derived_ids_are_stable() -> None:
    """The same scope gives the same id in every process, another scope another one."""
    parent = ObjectId("65a0c0ffee00000000000001")
    assert jobs.derived_id(parent, "restart", 0) == jobs.derived_id(parent, "restart", 0)
    assert jobs.derived_id(parent, "restart", 0) != jobs.derived_id(parent, "restart", 1)


def test_line_numbers_carry_the_fence() -> None:
    """Lines of a later attempt sort behind, and JavaScript can hold every number."""
    assert jobs.seq_fence(jobs.first_seq(3) + 500) == 3
    assert jobs.first_seq(2) > jobs.first_seq(1) + 2**31
    assert jobs.first_seq(2**20) < 2**53


def test_readers_get_an_enriched_row() -> None:
    """qual_name for name, highstate, flags, age and a number for the progress."""
    document = jobs.new_document(JobOrder(name="t.Job", username="ann"), ObjectId(), NOW)
    row = jobs.view({**document, "killed_at": NOW}, journal=False, now=NOW + timedelta(seconds=90))
    assert row["qual_name"] == "t.Job"
    assert "name" not in row
    assert row["highstate"] == "waiting"
    assert row["flag"] == {"zombie": False, "killed": True, "removed": False, "nonstop": False}
    assert row["age"] == 90.0
    assert row["prog"]["value"] == 0.0
    assert row["journal"] is False


@pytest.mark.parametrize(
    ("outcome", "options", "state", "left", "wait"),
    [
        pytest.param(Outcome.complete(1), {}, State.COMPLETE, 0, None, id="complete"),
        pytest.param(Outcome.failed("x", []), {"attempts": 2}, State.FAILED, 1, 600, id="failure-waits"),
        pytest.param(Outcome.failed("x", []), {}, State.ERROR, 0, None, id="attempts-used-up"),
        pytest.param(Outcome.crashed("x"), {}, State.ERROR, 0, None, id="crash-is-a-failure"),
        pytest.param(Outcome.deferred("x"), {}, State.DEFERRED, 1, 300, id="deferring-is-free"),
        pytest.param(Outcome.killed("x"), {}, State.KILLED, 1, None, id="killed-is-free"),
    ],
)
def test_decide(
    outcome: Outcome, options: dict[str, Any], state: State, left: int, wait: float | None
) -> None:
    """What becomes of a job that ran."""
    decision = decide(make_job(**options), outcome, NOW)
    assert (decision.state, decision.attempts_left) == (state, left)
    assert decision.query_at == (None if wait is None else NOW + timedelta(seconds=wait))


def test_every_state_can_be_left_or_is_final() -> None:
    """Final states are left by nothing that changes the state."""
    keep_the_state = {"restart", "remove", "consume", "settle", "mend", "retire"}
    assert {name for name, move in MOVES.items() if move.sources & FINAL} == keep_the_state
    assert all(MOVES[name].sources == MOVES[name].targets for name in keep_the_state)
    assert {state for move in MOVES.values() for state in move.sources} == set(State)
    assert MOVES["claim"].sources == WAITING
    assert {state for state in State if highstate(state) == "stopped"} == STOPPED


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (1048576, 1048576),
        ("1048576", 1048576),
        ("1048576B", 1048576),
        ("512MB", 512_000_000),
        ("512M", 512_000_000),
        ("2 GiB", 2 * 1024**3),
        ("1.5GB", 1_500_000_000),
        ("2048KiB", 2 * 1024**2),
    ],
)
def test_a_memory_limit_is_stored_in_bytes(given: Any, kept: int | None) -> None:
    """Whatever it was written as."""
    assert problem("memory_limit", given) is None
    order = JobOrder(name="t.Job", options={"memory_limit": given})
    assert jobs.new_document(order, ObjectId(), NOW)["memory_limit"] == kept


@pytest.mark.parametrize("given", [0, -5, 1.5e9, True, "", "MB", "1MB", "-1GB", "2 PB", "1e9", "5GBB", 2**51])
def test_no_memory_limit(given: Any) -> None:
    assert "memory_limit" in str(problem("memory_limit", given))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ("10/60s", "10/60s"),
        ("10/m", "10/60s"),
        ("500/1.5h", "500/5400s"),
        ("1/0.1s", "1/0.1s"),
        ("1000/31d", "1000/2678400s"),
    ],
)
def test_a_rate_limit_is_stored_in_seconds(given: Any, kept: str | None) -> None:
    """So that what means the same is the same."""
    assert problem("rate_limit", given) is None
    document = jobs.new_document(JobOrder(name="t.Job", options={"rate_limit": given}), ObjectId(), NOW)
    assert document["rate_limit"] == kept
    assert str(Job.from_document(document).rate_limit) == str(kept)


@pytest.mark.parametrize(
    "given",
    [10, True, "", "10", "10/", "0/s", "1001/s", "1/0.05s", "1/32d", "-1/s", "1/ s", "1/s\n", "x/s", "1/w"],
)
def test_no_rate_limit(given: Any) -> None:
    assert "rate_limit" in str(problem("rate_limit", given))


@given(
    count=st.integers(1, 5),
    seconds=st.floats(0.1, 10),
    steps=st.lists(st.floats(0, 5), max_size=40),
)
def test_no_window_holds_more_starts_than_the_rate(count: int, seconds: float, steps: list[float]) -> None:
    """Wherever it begins; and whoever waits as long as he is told may start."""
    rate, now = Rate(count, seconds), NOW
    starts: list[datetime] = []
    for step in steps:
        now += timedelta(seconds=step)
        free_at = rate.free_at(starts, now)
        assert (free_at > now) == (rate.left(starts, now) == 0)
        assert rate.free_at(starts, free_at) == free_at
        starts += [now] if free_at == now else []
    window = timedelta(seconds=seconds)
    assert all(late - early >= window for early, late in zip(starts, starts[count:], strict=False))


@pytest.mark.parametrize("name", OPTIONS)
def test_option_defaults_are_accepted(name: str) -> None:
    """And text or a negative number in its place is named."""
    assert problem(name, DEFAULTS[name]) is None
    wrong = 5 if name in ("worker", "max_running_key", "return_queues") else "soon"
    assert name in str(problem(name, wrong))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0),
        ("attempts", True),
        ("error_time", -1),
        ("error_time", float("nan")),
        ("defer_max", float("inf")),
        ("priority", PRIORITY_LIMIT + 1),
        ("force", 1),
        ("backoff", 0.5),
        ("backoff", float("nan")),
        ("jitter", 1.1),
        ("jitter", True),
        ("timeout", 0),
        ("wall_action", "stop"),
        ("zombie_action", ["kill"]),
        ("worker", ""),
        ("worker", "a\nb"),
    ],
)
def test_options_are_refused(name: str, value: Any) -> None:
    """Wrong types and ranges, with the option in the text."""
    assert name in str(problem(name, value))


def test_what_cannot_be_read_is_left_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Upkeep meets a document that somebody broke by hand again and again: one line says so."""
    broken = [{"_id": ObjectId()}, {"_id": ObjectId()}]
    for _ in range(3):
        assert list(readable(broken)) == []

    assert [record.msg for record in caplog.records] == ["job.unreadable"] * 2


def test_what_cannot_be_written_is_refused_like_anything_else() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert (
        problem("priority", deep) == f"priority is nested without end, expected {OPTIONS['priority'].accepts}"
    )
