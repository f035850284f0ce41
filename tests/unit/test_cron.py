"""Cron expressions: what is accepted and when they fire, clock changes included."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st

from core4 import cron
from core4.errors import BadOption

SPRING = datetime(2025, 3, 29, 12, tzinfo=UTC)  # Berlin skips 02:00-03:00 on the 30th
AUTUMN = datetime(2025, 10, 25, 12, tzinfo=UTC)  # and has it twice on October 26th
SPRING_NEW_YORK = datetime(2025, 3, 8, 12, tzinfo=UTC)  # New York skips 02:00-03:00 on the 9th
AUTUMN_NEW_YORK = datetime(2025, 11, 1, 12, tzinfo=UTC)  # and has 01:00-02:00 twice on November 2nd


def fires(expression: str, after: datetime, count: int, zone: str = "Europe/Berlin") -> list[str]:
    """The next instants in local time, as `day hour:minute offset`."""
    found = []
    for _ in range(count):
        after = cron.next_after(expression, after, zone)
        found.append(after.astimezone(ZoneInfo(zone)).strftime("%d %H:%M %z"))
    return found


# ---------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    "expression",
    [
        "* * * * *",
        "*/5 8-18 * * MON-FRI",
        "0 0 29 2 *",
        "@daily",
        "0 0 * MAR THU",
        "* * * * * *",
        "0 0 L * *",
        "0 0 * * 5L",
        "0 0 * * FRI#2,MON#1",
        "59 23 31 12 7",
        " 0  0 * * sun ",
    ],
)
def test_accepted(expression: str) -> None:
    cron.validate(expression)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "five fields"),
        ("* * * *", "five fields.*found 4"),
        ("* * * * * * *", "five fields.*found 7"),
        ("61 * * * *", "minute: 61 is not from 0 to 59"),
        ("0 0 * 0 *", "month: 0 is not from 1 to 12"),
        ("0 0 30 2 *", "never fires"),
        ("0 0 31 2,4,6,9,11 *", "never fires"),
        ("H * * * *", "not a cron expression: minute: H"),
        ("0 R(0-5) * * *", "hour: R.* is not understood"),
        ("@reboot", "expected one of @hourly"),
        ("*/0 * * * *", "step of .* is 0"),
        ("x y z a b", "not a cron expression"),
        ("0 0 15W * *", "day: 15W is not understood"),
        ("-5 * * * *", "minute: -5 is not understood"),
        ("1-2-3 * * * *", "is not understood"),
        ("*-5 * * * *", "is not understood"),
        (", * * * *", "is not understood"),
        ("* " * 200, "longer than 200"),
        ("²/2 * * * *", "is not understood"),
    ],
)
def test_refused(expression: str, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        cron.validate(expression)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("59/15 * * * *", "59/15 matches 59 only; write 59"),
        ("*/90 * * * *", r"\*/90 matches 0 only"),
        ("0 0 * * 6/1", "say where 6/1 ends, like 6-6/1"),
        ("0 23-6/2 * * *", "23-6/2 runs over the end"),
        ("0 0 13 * FRI#2", "give one of both"),
        ("0 0 13 * 5L", "give one of both"),
        ("0 0 * * 1,FRI#2", "does not go together"),
    ],
)
def test_what_cron_readers_disagree_about_is_refused(expression: str, words: str) -> None:
    """The texts name the clear form: these expressions mean different things to different programs."""
    with pytest.raises(BadOption, match=words):
        cron.validate(expression)


@pytest.mark.parametrize(
    ("unclear", "clear"),
    [
        ("5/20 * * * *", "5,25,45 * * * *"),
        ("0 9-9 * * *", "0 9 * * *"),
        ("0 22-2 * * *", "0 22,23,0,1,2 * * *"),
        ("0 0 * * FRI-MON", "0 0 * * 5,6,0,1"),
        ("0 0 * * 5-7", "0 0 * * 5,6,0"),
        ("0 0 * * MON-SUN", "0 0 * * *"),
        ("0 0 * 11-1 *", "0 0 * 11,12,1 *"),
        ("@weekly", "0 0 * * SUN"),
        ("@YEARLY", "0 0 1 1 *"),
        ("0,* 3,* * * *", "* * * * *"),
    ],
)
def test_same_instants(unclear: str, clear: str) -> None:
    start = datetime(2025, 1, 1, tzinfo=UTC)
    assert list(islice(cron.fires(unclear, start), 60)) == list(islice(cron.fires(clear, start), 60))


def test_day_and_weekday() -> None:
    """As in crontab(5): one of both is enough, unless either begins with a star."""
    start, end = datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    days = [start + timedelta(days=n) for n in range(1, 365)]

    either = cron.fires_between("0 0 13 * FRI", start, end)
    both = cron.fires_between("0 0 */2 * MON", start, end)
    every = cron.fires_between("0 0 1-31 * MON", start, end)
    assert either == [day for day in days if day.day == 13 or day.isoweekday() == 5]
    assert both == [day for day in days if day.day % 2 and day.isoweekday() == 1]
    assert every == [*days, end]


def test_normalised() -> None:
    assert cron.normalise(" @Daily ") == "0 0 * * *"
    assert cron.normalise("*/5  8-18 * *\tmon-fri") == "*/5 8-18 * * MON-FRI"
    with pytest.raises(BadOption):
        cron.normalise("* * * *")


@pytest.mark.parametrize(
    "zone", ["Mars/Olympus", "", "../../etc/passwd", "/etc/localtime", "Europe", "localtime", "x\0y", "CEST"]
)
def test_zone_refused(zone: str) -> None:
    with pytest.raises(BadOption, match="not a time zone; expected a name like Europe/Berlin"):
        cron.validate_zone(zone)


def test_seconds_stand_last() -> None:
    start = datetime(2025, 1, 1, tzinfo=UTC)
    found = cron.fires_between("0 12 * * * */20", start, start + timedelta(days=1))
    assert [moment.strftime("%H:%M:%S") for moment in found] == ["12:00:00", "12:00:20", "12:00:40"]


# ---------------------------------------------------------------------- when they fire


def test_a_fixed_time_in_the_skipped_hour_fires_once_at_its_end() -> None:
    assert fires("30 2 * * *", SPRING, 2) == ["30 03:00 +0200", "31 02:30 +0200"]
    assert fires("*/15 2 * * *", SPRING, 2) == ["30 03:00 +0200", "31 02:00 +0200"]
    assert fires("0 2,3 * * *", SPRING, 2) == ["30 03:00 +0200", "31 02:00 +0200"]
    zone = "America/New_York"
    assert fires("30 2 * * *", SPRING_NEW_YORK, 2, zone) == ["09 03:00 -0400", "10 02:30 -0400"]
    assert fires("30 3 * * *", SPRING_NEW_YORK, 2, zone) == ["09 03:30 -0400", "10 03:30 -0400"]


def test_a_fixed_time_in_the_repeated_hour_fires_once() -> None:
    assert fires("30 2 * * *", AUTUMN, 2) == ["26 02:30 +0200", "27 02:30 +0100"]
    assert fires("0,30 2 * * *", AUTUMN, 3) == ["26 02:00 +0200", "26 02:30 +0200", "27 02:00 +0100"]
    zone = "America/New_York"
    assert fires("30 1 * * *", AUTUMN_NEW_YORK, 2, zone) == ["02 01:30 -0400", "03 01:30 -0500"]
    assert fires("30 2 * * *", AUTUMN_NEW_YORK, 2, zone) == ["02 02:30 -0500", "03 02:30 -0500"]


@pytest.mark.parametrize(
    ("zone", "start"),
    [
        ("Europe/Berlin", SPRING),
        ("Europe/Berlin", AUTUMN),
        ("America/New_York", SPRING_NEW_YORK),
        ("America/New_York", AUTUMN_NEW_YORK),
    ],
)
@pytest.mark.parametrize(
    ("expression", "seconds"),
    [
        ("0 * * * *", 3600),
        ("@hourly", 3600),
        ("30 0-23 * * *", 3600),
        ("*/15 * * * *", 900),
        ("* * * * *", 60),
    ],
)
def test_every_hour_goes_on_in_real_time(zone: str, start: datetime, expression: str, seconds: int) -> None:
    """Through the skipped and the repeated hour: the distance is always the same."""
    moments = list(islice(cron.fires(expression, start, zone), 36 * 3600 // seconds))

    assert {(later - earlier).total_seconds() for earlier, later in pairwise(moments)} == {float(seconds)}


def test_every_second_through_the_turn() -> None:
    turn = datetime(2025, 10, 26, 1, tzinfo=UTC)
    moments = cron.fires_between(
        "* * * * * *", turn - timedelta(seconds=90), turn + timedelta(seconds=90), "Europe/Berlin"
    )
    assert len(moments) == 180


def test_the_next_instant_is_later_than_the_last() -> None:
    noon = datetime(2025, 5, 1, 12, tzinfo=UTC)

    assert cron.next_after("0 12 * * *", noon) == noon.replace(day=2)
    assert cron.next_after("0 12 * * *", noon.replace(hour=11, minute=59, second=59)) == noon
    assert cron.next_after("0 12 * * *", noon - timedelta(microseconds=1)) == noon
    assert cron.next_after("0 12 * * *", noon + timedelta(microseconds=1)) == noon.replace(day=2)


def test_a_window_has_its_end_and_not_its_start() -> None:
    noon = datetime(2025, 5, 1, 12, tzinfo=UTC)

    assert cron.fires_between("0 * * * *", noon, noon + timedelta(hours=2)) == [
        noon.replace(hour=13),
        noon.replace(hour=14),
    ]
    assert cron.fires_between("0 * * * *", noon, noon) == []
    assert cron.fires_between("0 * * * *", noon, noon - timedelta(days=1)) == []
    assert len(cron.fires_between("* * * * *", noon, noon + timedelta(days=9), limit=7)) == 7


def test_a_zone_that_skipped_a_day() -> None:
    """Samoa had no December 30th in 2011."""
    start = datetime(2011, 12, 29, 0, tzinfo=UTC)
    assert fires("30 2 * * *", start, 3, "Pacific/Apia") == [
        "29 02:30 -1000",
        "31 00:00 +1400",
        "31 02:30 +1400",
    ]


def test_rare_dates_are_found() -> None:
    start = datetime(2097, 1, 1, tzinfo=UTC)
    assert cron.next_after("0 0 29 2 *", start) == datetime(2104, 2, 29, tzinfo=UTC)


# ---------------------------------------------------------------------- against others

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "America/St_Johns", "Africa/Casablanca")
ODD_ZONES = ("Australia/Lord_Howe", "America/Havana", "Africa/Cairo", "Antarctica/Troll", "America/Sao_Paulo")


def numbers(low: int, high: int) -> st.SearchStrategy[str]:
    """One item or a few of what every cron reader reads alike."""
    number = st.integers(low, high).map(str)
    bounds = st.tuples(st.integers(low, high), st.integers(low, high)).filter(lambda pair: pair[0] < pair[1])
    spans = bounds.map(lambda pair: f"{pair[0]}-{pair[1]}")
    steps = bounds.flatmap(
        lambda pair: st.integers(1, pair[1] - pair[0]).map(lambda step: f"{pair[0]}-{pair[1]}/{step}")
    )
    items = st.lists(st.one_of(number, spans, steps), min_size=1, max_size=3).map(",".join)
    stars = st.integers(1, high - low).map(lambda step: f"*/{step}")
    return st.one_of(st.just("*"), items, number, stars)


WEEKDAYS = st.one_of(
    numbers(0, 7),
    st.just("*"),
    st.sampled_from(["MON", "SUN", "MON-FRI", "TUE,SAT", "FRI#2", "1#1,3#5", "5L", "0L"]),
)
DAYS = st.one_of(st.just("*"), st.just("L"), numbers(1, 31))


def readable(fields: tuple[str, ...]) -> bool:
    """Not what we refuse: a date and an n-th weekday at once, dates that never come."""
    if any(mark in fields[4] for mark in "#L") and not fields[2].startswith("*"):
        return False
    try:
        cron.validate(" ".join(fields))
    except BadOption as error:
        if "never fires" not in error.detail:
            raise  # all the rest is to be read
        return False
    return True


EXPRESSIONS = (
    st.tuples(numbers(0, 59), numbers(0, 23), DAYS, numbers(1, 12), WEEKDAYS).filter(readable).map(" ".join)
)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2036, 1, 1), timezones=st.just(UTC))


def theirs(expression: str, after: datetime, zone: str) -> Iterator[datetime]:
    """cronsim's instants. It takes `*/5 2` for an expression of every hour: for it, stars become spans."""
    minute, hour, *rest = expression.split()
    if not hour.startswith("*"):
        minute = minute.replace("*", "0-59")
    last = None
    for moment in CronSim(" ".join([minute, hour, *rest]), after.astimezone(ZoneInfo(zone))):
        instant = moment.astimezone(UTC)
        if instant != last:  # it names the end of a gap once for each time that is skipped
            yield instant
        last = instant


def in_second_pass(moment: datetime, zone: str) -> bool:
    return bool(moment.astimezone(ZoneInfo(zone)).fold)


@seed(20251026)
@settings(max_examples=150, derandomize=True, database=None)
@given(EXPRESSIONS, st.sampled_from(ZONES), MOMENTS)
@example("30 2 * * *", "Europe/Berlin", AUTUMN)
@example("30 2 * * *", "Europe/Berlin", SPRING)
@example("30 * * * *", "Europe/Berlin", SPRING)
@example("0 */2 * * *", "America/New_York", SPRING_NEW_YORK)
def test_like_cronsim(expression: str, zone: str, after: datetime) -> None:
    """The same instants as an independent reader that follows Debian's cron."""
    after = after.replace(microsecond=0)
    if in_second_pass(after, zone):
        after += timedelta(hours=3)  # there cronsim starts with the first pass
    expected = list(islice(theirs(expression, after, zone), 30))

    assert list(islice(cron.fires(expression, after, zone), len(expected))) == expected


def shown(expression: str, zone: str, low: datetime, high: datetime) -> set[datetime]:
    """The instants by definition: every minute is looked at. cronsim says which local times match."""
    sim = CronSim(expression, low)
    place = ZoneInfo(zone)

    def matches(wall: datetime) -> bool:
        return (
            wall.minute in sim.minutes
            and wall.hour in sim.hours
            and wall.month in sim.months
            and sim.match_day(wall.date())
        )

    moments = [low + timedelta(minutes=n) for n in range(1, int((high - low).total_seconds()) // 60 + 1)]
    every_hour = expression.split()[1].startswith("*")
    found = set()
    newest = low.astimezone(place).replace(tzinfo=None)
    for moment in moments:
        wall = moment.astimezone(place).replace(tzinfo=None)
        if every_hour:
            found |= {moment} if matches(wall) else set()
        elif wall > newest:
            passed = int((wall - newest).total_seconds()) // 60  # more than one at a gap
            found |= {moment} if any(matches(wall - timedelta(minutes=n)) for n in range(passed)) else set()
        newest = max(newest, wall)
    return found


def turns(zone: str) -> list[datetime]:
    """The hours in 2015-2030 before the offset changes."""
    place = ZoneInfo(zone)

    def changes(moments: list[datetime]) -> list[int]:
        offsets = [moment.astimezone(place).utcoffset() for moment in moments]
        return [n for n in range(len(moments) - 1) if offsets[n] != offsets[n + 1]]

    days = [datetime(2015, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(16 * 366)]
    hours = [[days[n] + timedelta(hours=hour) for hour in range(25)] for n in changes(days)]
    return [day[n] for day in hours for n in changes(day)]


TURNS = [(zone, turn) for zone in (*ODD_ZONES, "Europe/Berlin", "America/New_York") for turn in turns(zone)]


@seed(20251026)
@settings(max_examples=100, derandomize=True, database=None)
@given(numbers(0, 59), numbers(0, 23), st.sampled_from(TURNS))
def test_by_definition_around_every_turn(minute: str, hour: str, turn: tuple[str, datetime]) -> None:
    """Half-hour and two-hour changes, changes at midnight: no instant is missing, none is too many."""
    zone, moment = turn
    expression = f"{minute} {hour} * * *"
    # Every hour of the day, with room for the turn itself.
    low, high = moment - timedelta(hours=14), moment + timedelta(hours=14)
    found = cron.fires_between(expression, low, high, zone, limit=10_000)

    assert set(found) == shown(expression, zone, low, high)
    assert found == sorted(set(found))


@seed(20251026)
@settings(max_examples=100, derandomize=True, database=None)
@given(
    numbers(0, 59),
    numbers(0, 23),
    st.sampled_from(TURNS),
    st.timedeltas(timedelta(hours=-8), timedelta(hours=8)),
)
def test_wherever_one_starts(minute: str, hour: str, turn: tuple[str, datetime], shift: timedelta) -> None:
    """What fires later than a moment does not depend on where the count began, nor on the time zone of it."""
    zone, moment = turn
    expression = f"{minute} {hour} * * *"
    low, middle, high = moment - timedelta(hours=12), moment + shift, moment + timedelta(hours=14)
    whole = cron.fires_between(expression, low, high, zone, limit=10_000)
    part = cron.fires_between(expression, middle.astimezone(ZoneInfo(zone)), high, zone, limit=10_000)

    assert part == [instant for instant in whole if instant > middle]
