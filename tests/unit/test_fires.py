"""What becomes of due instants, and what a change to a schedule means: pure decisions, no database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from core4 import cron
from core4.errors import BadOption, UnknownOption
from core4.schedules import (
    PORTION,
    WINDOW,
    Schedule,
    changed,
    created,
    decide,
    declared,
    effective,
    fire_id,
    order,
    view,
)
from core4.timetable import LIMIT, checked

NOON = datetime(2025, 5, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def make(cursor: datetime = NOON, *, override: dict[str, Any] | None = None, **code: Any) -> Schedule:
    """An hourly schedule of the code, decided up to `cursor`."""
    spec = {"qual_name": "a.Job", "expression": "0 * * * *", **code}
    return Schedule.from_document(created("a.Job", cursor, code=spec, override=override or {}))


def hours(instants: tuple[datetime, ...]) -> list[int]:
    return [instant.hour for instant in instants]


# ---------------------------------------------------------------------- what is missed

LATE = NOON + 5 * HOUR + timedelta(minutes=30)  # five instants passed, nobody was there
PUNCTUAL = NOON + 5 * HOUR  # and here the fifth is just due


@pytest.mark.parametrize(
    ("now", "fields", "fire", "skip"),
    [
        pytest.param(LATE, {"missed": "skip"}, [], [13, 14, 15, 16, 17], id="skip"),
        pytest.param(LATE, {"missed": "one"}, [17], [13, 14, 15, 16], id="one-is-the-newest"),
        pytest.param(LATE, {"missed": "all"}, [13, 14, 15, 16, 17], [], id="all"),
        pytest.param(LATE, {"missed": "all", "limit": 2}, [16, 17], [13, 14, 15], id="all-up-to-a-limit"),
        pytest.param(LATE, {"missed": "all", "max_age": 6000}, [16, 17], [13, 14, 15], id="all-not-too-old"),
        pytest.param(LATE, {"missed": "one", "max_age": 600}, [], [13, 14, 15, 16, 17], id="one-not-too-old"),
        pytest.param(PUNCTUAL, {"missed": "skip"}, [17], [13, 14, 15, 16], id="skip-but-fire-what-is-due"),
        pytest.param(PUNCTUAL, {"missed": "one"}, [17], [13, 14, 15, 16], id="one-for-missed-and-due"),
        pytest.param(
            PUNCTUAL, {"missed": "all", "limit": 1}, [16, 17], [13, 14, 15], id="limit-counts-the-missed"
        ),
    ],
)
def test_missed(now: datetime, fields: dict[str, Any], fire: list[int], skip: list[int]) -> None:
    decision = decide(make(**fields), now)

    assert decision is not None
    assert (hours(decision.fire), hours(decision.skip)) == (fire, skip)
    assert decision.cursor == NOON + 5 * HOUR


@pytest.mark.parametrize("missed", ["skip", "one", "all"])
def test_nothing_is_due(missed: str) -> None:
    """Not yet, and not again: also when the clock was turned back behind the cursor."""
    for now in (NOON, NOON + HOUR - timedelta(milliseconds=1), NOON - timedelta(days=400)):
        assert decide(make(missed=missed), now) is None


@pytest.mark.parametrize("missed", ["skip", "one", "all"])
def test_a_short_delay_misses_nothing(missed: str) -> None:
    now, cursor = NOON + timedelta(seconds=30), NOON
    fire: list[datetime] = []
    while decision := decide(make(cursor, expression="* * * * * *", missed=missed, limit=1), now):
        assert len(decision.fire) <= PORTION  # an operator is heard in between
        assert decision.skip == ()
        fire, cursor = [*fire, *decision.fire], decision.cursor

    assert len(fire) == 30


@pytest.mark.parametrize(("missed", "fired"), [("skip", 61), ("one", 1), ("all", 100 + 61)])
def test_a_long_way_behind_is_decided_piece_by_piece(missed: str, fired: int) -> None:
    """A schedule of every second after six hours: bounded work each time, the same outcome in the end."""
    now = NOON + 6 * HOUR
    schedule = make(expression="* * * * * *", missed=missed)
    fire: list[datetime] = []
    skip: list[datetime] = []
    while decision := decide(schedule, now):
        assert len(decision.fire) + len(decision.skip) <= WINDOW
        assert decision.cursor > schedule.cursor
        fire += decision.fire
        skip += decision.skip
        schedule = make(decision.cursor, expression="* * * * * *", missed=missed)

    assert len(fire) == fired
    assert len(set(fire) | set(skip)) == 6 * 3600
    assert fire[-1] == now == schedule.cursor


@seed(20251026)
@settings(max_examples=300, derandomize=True, database=None)
@given(
    st.sampled_from(
        ["* * * * *", "*/15 * * * *", "0 * * * *", "30 2 * * *", "*/2 * * * * */20", "0 0 1 * *"]
    ),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]),
    st.sampled_from(["skip", "one", "all"]),
    st.integers(1, 20),
    st.one_of(st.none(), st.floats(1, 1e6)),
    st.datetimes(datetime(2025, 1, 1), datetime(2026, 1, 1), timezones=st.just(UTC)),
    st.lists(st.timedeltas(timedelta(0), timedelta(hours=20)), min_size=1, max_size=6),
)
def test_every_instant_is_decided_once(
    expression: str,
    zone: str,
    missed: str,
    limit: int,
    max_age: float | None,
    start: datetime,
    steps: list[timedelta],
) -> None:
    """Whenever one looks: each instant is fired or skipped, none twice, none of another time."""
    fields: dict[str, Any] = {"expression": expression, "zone": zone, "missed": missed}
    fields |= {"limit": limit, "max_age": max_age}
    start = start.replace(microsecond=0)
    now, cursor = start, start
    decided: list[datetime] = []
    for step in steps:
        now += step
        while decision := decide(make(cursor, **fields), now):
            decided += sorted(decision.fire + decision.skip)
            cursor = decision.cursor

    assert decided == cron.fires_between(expression, start, now, zone, limit=20_000)


# ---------------------------------------------------------------------- code and operator


def test_the_operator_wins_field_by_field() -> None:
    schedule = make(override={"expression": "0 3 * * *", "enabled": False}, zone="Europe/Berlin", limit=7)
    assert (schedule.expression, schedule.zone, schedule.limit) == ("0 3 * * *", "Europe/Berlin", 7)
    assert schedule.source == "code"
    assert not schedule.active


def test_a_schedule_begins_when_it_is_made() -> None:
    """The first start catches up nothing."""
    schedule = make(NOON, expression="* * * * *", missed="all")
    assert schedule.due() == NOON + timedelta(minutes=1)


def test_other_instants_count_from_now_on() -> None:
    """A daily schedule made hourly at noon owes nothing for the morning."""
    document = created("a.Job", NOON - 12 * HOUR, code={"qual_name": "a.Job", "expression": "0 0 * * *"})
    hourly = changed(document, NOON, override={"expression": "0 * * * *"})

    assert hourly is not None
    assert Schedule.from_document(hourly).due() == NOON + HOUR
    assert hourly["since"] == NOON
    assert hourly["rev"] == 2


def test_what_does_not_change_the_instants_keeps_the_cursor() -> None:
    document = created("a.Job", NOON, code={"qual_name": "a.Job", "expression": "0 * * * *"})
    later = changed(document, NOON + 5 * HOUR, override={"args": {"n": 1}, "missed": "all"})

    assert later is not None
    assert later["cursor"] == later["since"] == NOON


def test_the_cursor_never_goes_back() -> None:
    """Also when the clock did."""
    document = created("a.Job", NOON, code={"qual_name": "a.Job", "expression": "0 * * * *"})
    other = changed(document, NOON - 9 * HOUR, override={"expression": "30 * * * *"})

    assert other is not None
    assert other["cursor"] == NOON


def test_no_news_is_no_change() -> None:
    document = created("a.Job", NOON, code={"qual_name": "a.Job", "expression": "0 * * * *"})
    assert changed(document, NOON + HOUR, code={"qual_name": "a.Job", "expression": "0 * * * *"}) is None


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"expresion": "* * * * *"}, UnknownOption, "expresion is not a field of a schedule"),
        ({"expression": "61 * * * *"}, BadOption, "expression is '61 .*minute: 61 is not from 0 to 59"),
        ({"expression": 5}, BadOption, "expected a cron expression"),
        ({"zone": "Mars/Olympus"}, BadOption, "'Mars/Olympus' is not a time zone"),
        ({"missed": "latest"}, BadOption, "expected skip, one or all"),
        ({"limit": 0}, BadOption, "from 1 to 1000"),
        ({"limit": LIMIT + 1}, BadOption, "from 1 to 1000"),
        ({"limit": True}, BadOption, "from 1 to 1000"),
        ({"max_age": -1}, BadOption, "seconds above 0"),
        ({"args": [1]}, BadOption, "a JSON object"),
        ({"args": {"x": float("nan")}}, BadOption, "a JSON object"),
        ({"args": {1: 2}}, BadOption, "a JSON object"),
        ({"args": {"x": object()}}, BadOption, "a JSON object"),
        ({"args": {"x": 1 << 80}}, BadOption, "a JSON object"),
        ({"args": {"x": "\ud800"}}, BadOption, "a JSON object"),
        ({"args": {"a\0": 1}}, BadOption, "a JSON object"),
        ({"options": {"colour": 1}}, BadOption, "a mapping with some of attempts"),
        ({"options": {"attempts": 0}}, BadOption, "attempts is 0"),
        ({"enabled": 1}, BadOption, "true or false"),
        ({"namespace": "a b"}, BadOption, "A-Z a-z 0-9"),
        ({"qual_name": ""}, BadOption, "the name of a job"),
    ],
)
def test_refused(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        checked(fields)


def test_checked_is_normal() -> None:
    assert checked({"expression": "@daily", "limit": 5}) == {"expression": "0 0 * * *", "limit": 5}


@pytest.mark.parametrize(
    "name", ["", "a b", "x" * 201, "a|b", "a\n", "/a", "a//b", "a/../b", "./a", "next", "pause/a"]
)
def test_bad_name(name: str) -> None:
    with pytest.raises(BadOption, match="name is"):
        created(name, NOON, code={"qual_name": "a.Job", "expression": "0 * * * *"})


@pytest.mark.parametrize("name", ["a", "ns:task", "reports/daily", "pause", "next/a", "a.b@c-d_e", "ümlaut"])
def test_good_name(name: str) -> None:
    assert created(name, NOON, code={"qual_name": "a.Job", "expression": "0 * * * *"})["_id"] == name


@pytest.mark.parametrize("field", ["qual_name", "expression"])
def test_a_schedule_needs_a_job_and_an_expression(field: str) -> None:
    spec = {"qual_name": "a.Job", "expression": "0 * * * *"}
    del spec[field]
    with pytest.raises(BadOption, match=f"needs its {field}"):
        created("x", NOON, override=spec)


def test_declared() -> None:
    assert declared({"_id": "a.Job", "schedule": None}) == []
    assert declared({"_id": "a.Job", "schedule": "@daily"}) == [
        {"name": "a.Job", "qual_name": "a.Job", "expression": "@daily"}
    ]
    assert declared({"_id": "a.Job", "schedule": {"expression": "@daily", "zone": "UTC", "name": "n"}}) == [
        {"name": "n", "qual_name": "a.Job", "expression": "@daily", "zone": "UTC"}
    ]


# ---------------------------------------------------------------------- what is enqueued and shown


def test_the_id_belongs_to_schedule_and_instant() -> None:
    ids = {fire_id(name, NOON + n * HOUR) for name in ("a", "b") for n in range(3)}
    assert len(ids) == 6
    assert fire_id("a", NOON).generation_time == NOON
    assert fire_id("a", NOON) == fire_id("a", NOON.astimezone(ZoneInfo("Asia/Tokyo")))


def test_the_order_takes_the_newest_options() -> None:
    entry = {"_id": "a.Job", "kind": "class", "namespace": "night", "options": {"attempts": 3, "priority": 5}}
    wanted = order(make(options={"priority": 9}, args={"n": 1}), entry, username="ann", request_id="r")

    assert (wanted.name, wanted.args, wanted.namespace) == ("a.Job", {"n": 1}, "night")
    assert wanted.options == {"attempts": 3, "priority": 9}
    assert (wanted.unique, wanted.keep_stopped, wanted.username) == (False, True, "ann")
    assert order(make(namespace="day"), entry, username="ann", request_id="r").namespace == "day"


def test_shown() -> None:
    """What is in force, and beside it what the code and what the operator says."""
    row = view(make(override={"zone": "Europe/Berlin"}, expression="0 14 * * *"), NOON, count=2)

    assert (row["state"], row["source"], row["zone"]) == ("active", "code", "Europe/Berlin")
    assert row["code"] == {"qual_name": "a.Job", "expression": "0 14 * * *"}
    assert row["override"] == {"zone": "Europe/Berlin"}
    assert row["next"] == [NOON + timedelta(days=1), NOON + timedelta(days=2)]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"paused": {"at": NOON, "by": "ann"}}, "paused"),
        ({"withdrawn": True}, "withdrawn"),
        ({"override": {"enabled": False}}, "disabled"),
        ({"override": {"zone": "Mars/Olympus"}}, "broken"),
    ],
)
def test_shown_state(fields: dict[str, Any], state: str) -> None:
    code = {"qual_name": "a.Job", "expression": "0 * * * *"}
    row = view(Schedule.from_document({**created("a.Job", NOON, code=code), **fields}), NOON)

    assert row["state"] == state
    assert row["next"] == []
    assert (row["reason"] is not None) == (state == "broken")


def test_fields_of_a_newer_version_are_left_alone() -> None:
    document = created("a.Job", NOON, code={"qual_name": "a", "expression": "* * * * *", "jitter": 5})
    assert "jitter" not in effective(document)
    assert Schedule.from_document(document).due() == NOON + timedelta(minutes=1)
