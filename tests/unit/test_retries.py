"""When a failed job is due again. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st

from core4 import jobs
from core4.jobs import Job, JobOrder
from core4.retries import Outcome, decide, retry_delay
from core4.transitions import TRACEBACK_LINES, TRACEBACK_TEXT, clean, shortened

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
FACTORS = st.floats(1, 100) | st.integers(1, 100)
WAITS = st.floats(0.001, 3e8)


def make_job(trial: int = 1, job_id: ObjectId | None = None, **options: Any) -> Job:
    order = JobOrder(name="t.Job", options={"attempts": 10_000, **options})
    document = jobs.new_document(order, job_id or ObjectId(), NOW)
    return Job.from_document({**document, "state": "running", "trial": trial})


def delays(count: int, **options: Any) -> list[float]:
    job = make_job(**options)
    return [retry_delay(job, job.attempts - failures) for failures in range(1, count + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [600, 600, 600], id="fixed-by-default"),
        pytest.param({"error_time": 2, "backoff": 3}, [2, 6, 18], id="grows"),
        pytest.param({"error_time": 2, "backoff": 3, "error_time_max": 10}, [2, 6, 10], id="capped"),
        pytest.param({"backoff": 100}, [600, 60_000, 86_400], id="a-day-at-most"),
        pytest.param({"error_time": 172_800, "backoff": 2}, [172_800] * 3, id="a-longer-wait-was-asked-for"),
    ],
)
def test_the_wait_after_each_failure(options: dict[str, Any], expected: list[float]) -> None:
    assert delays(3, **options) == expected


@given(FACTORS, WAITS, WAITS, st.integers(0, 9_999))
def test_the_wait_never_shrinks_and_stays_below_the_cap(
    backoff: float, error_time: float, most: float, left: int
) -> None:
    """With any legal numbers, after any number of failures."""
    job = make_job(backoff=backoff, error_time=error_time, error_time_max=most)
    delay = retry_delay(job, left)
    assert error_time <= delay <= max(most, error_time)
    assert retry_delay(job, max(left - 1, 0)) >= delay


@given(st.floats(0, 1), st.integers(1, 10_000), st.binary(min_size=12, max_size=12))
def test_jitter_takes_off_its_share_and_decides_the_same_again(share: float, trial: int, raw: bytes) -> None:
    first, again = (make_job(trial, ObjectId(raw), jitter=share) for _ in range(2))
    assert 600 * (1 - share) <= retry_delay(first, 5) <= 600
    assert decide(first, Outcome.failed("x", []), NOW) == decide(again, Outcome.failed("x", []), NOW)


def test_jitter_differs_from_job_to_job_and_attempt_to_attempt() -> None:
    job_id = ObjectId()
    seen = {retry_delay(make_job(trial, job_id, jitter=1), 5) for trial in range(1, 50)}
    seen |= {retry_delay(make_job(jitter=1), 5) for _ in range(50)}
    assert len(seen) == 99


def test_a_job_of_an_older_version_waits_as_it_did() -> None:
    """Its document has none of the newer options."""
    document = dict(make_job().document)
    for name in ("backoff", "error_time_max", "jitter"):
        del document[name]
    decision = decide(Job.from_document(document), Outcome.failed("x", []), NOW)
    assert decision.query_at == NOW + timedelta(seconds=600)


@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 20_000))
@settings(max_examples=30)
def test_a_traceback_keeps_its_head_and_its_tail(some: list[str], times: int) -> None:
    lines = [clean(line) for line in some] * (times // 20 + 1)
    kept = shortened(lines)
    if len(lines) <= TRACEBACK_LINES and sum(map(len, lines)) <= TRACEBACK_TEXT:
        assert kept == lines
        return
    (marker,) = [n for n, line in enumerate(kept) if line.endswith(" lines left out]\n")]
    assert lines[:marker] == kept[:marker]
    assert lines[len(lines) - (len(kept) - marker - 1) :] == kept[marker + 1 :]
    assert len(kept) <= TRACEBACK_LINES
    assert sum(map(len, kept)) <= TRACEBACK_TEXT
    assert shortened(kept) == kept
    assert f"[{len(lines) - len(kept) + 1} lines" in kept[marker]


def test_half_a_million_lines_are_cut_in_one_pass() -> None:
    assert len(shortened(["a"] * 450_000)) == TRACEBACK_LINES - 1
    assert len(shortened(["a" * 100] * 450_000)) == 2 * ((TRACEBACK_TEXT // 2 - 50) // 100) + 1
