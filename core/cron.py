"""Cron expressions: checked, and the instants they fire at. The only module that knows croniter.

Five fields (minute hour day month weekday), six (a second behind them, as croniter has it), or ``@hourly``
and its like. They are read in the local time of an IANA zone, with Debian cron's rules: of day and weekday
one is enough unless either begins with ``*``; a fixed hour fires once a day whatever the clocks do, in the
repeated hour at its first pass and for the skipped hour at its end; an expression for every hour (``*``,
``*/n`` or all 24) goes on in real time through both.

What cron readers disagree about is refused and the clear form named. Fields reach croniter as plain
numbers: it reads ``9-9`` as every hour, steps wrongly through ranges like ``23-6/2``, and fires twice in
a repeated hour, so it only ever walks local times without a zone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from zoneinfo import ZoneInfo

from core4.errors import BadOption

Walk = Callable[[datetime], datetime]

ALIASES = MappingProxyType(
    {
        "@hourly": "0 * * * *",
        "@daily": "0 0 * * *",
        "@midnight": "0 0 * * *",
        "@weekly": "0 0 * * 0",
        "@monthly": "0 0 1 * *",
        "@yearly": "0 0 1 1 *",
        "@annually": "0 0 1 1 *",
    }
)
LENGTH = 200  # characters of an expression

_SECOND = timedelta(seconds=1)
_A_DAY = datetime(2024, 1, 1)  # noqa: DTZ001 - local times are walked without a zone, see above
_LONGEST_SHIFT = timedelta(hours=26)  # no zone can turn its clocks back by more


@dataclass(frozen=True)
class _Field:
    """One field: the numbers it takes, and the names of numbers from `low` on."""

    name: str
    low: int
    high: int
    names: Sequence[str] = ()


_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_WEEKDAY = _Field("weekday", 0, 7, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"))
_DAY = _Field("day", 1, 31)
_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _DAY,
    _Field("month", 1, 12, _MONTHS),
    _WEEKDAY,
    _Field("second", 0, 59),
)
_ITEM = re.compile(r"(\*|[A-Z0-9]+)(?:-([A-Z0-9]+))?(?:/([0-9]{1,4}))?")
_NTH_WEEKDAY = re.compile(r"([0-7]|[A-Z]{3})(?:#([1-5])|L)")


@dataclass(frozen=True)
class _Plan:
    """An expression that has been checked, as croniter gets it."""

    text: str
    day_or: bool
    every_hour: bool

    def walker(self) -> Walk:
        """What gives the first matching local time after another. Not to be shared: it has a state."""
        from croniter import croniter  # here, because job modules import this one and few need it

        # croniter gives up after this many years; whatever recurs at all does so within them.
        cron = croniter(self.text, _A_DAY, day_or=self.day_or, max_years_between_matches=50)

        def walk(wall: datetime) -> datetime:
            following: datetime = cron.get_next(datetime, start_time=wall)
            return following

        return walk


def validate(expression: str) -> None:
    """Check a cron expression.

    Raises: BadOption with the reason.
    """
    _plan(expression)


def normalise(expression: str) -> str:
    """The expression with single spaces, upper case and its fields for an ``@`` word.

    Raises: BadOption with the reason.
    """
    _plan(expression)
    return " ".join(_split(expression))


def validate_zone(zone: str) -> None:
    """Check the name of a time zone.

    Raises: BadOption with the reason.
    """
    _zone(zone)


def next_after(expression: str, after: datetime, zone: str = "UTC") -> datetime:
    """The first instant later than `after` (aware) at which the expression fires in `zone`, in UTC.

    Raises: BadOption for an expression or a zone that is not accepted.
    """
    return next(fires(expression, after, zone))


def fires_between(
    expression: str, after: datetime, until: datetime, zone: str = "UTC", limit: int = 1000
) -> list[datetime]:
    """The first `limit` instants later than `after` and not later than `until`, in UTC.

    Raises: BadOption for an expression or a zone that is not accepted.
    """
    found: list[datetime] = []
    for instant in islice(fires(expression, after, zone), limit):
        if instant > until:
            break
        found.append(instant)
    return found


def fires(expression: str, after: datetime, zone: str = "UTC") -> Iterator[datetime]:
    """Every instant later than `after`, in order and without end, in UTC.

    Raises: BadOption for an expression or a zone that is not accepted.
    """
    plan, place = _plan(expression), _zone(zone)
    return _fires(plan, after.astimezone(UTC).replace(microsecond=0), place)


def _fires(plan: _Plan, after: datetime, zone: tzinfo) -> Iterator[datetime]:
    walk = plan.walker()
    following = _next_in_real_time if plan.every_hour else _next_once
    while True:
        after = following(walk, after, zone)
        yield after


# ---------------------------------------------------------------------- reading an expression


@lru_cache(maxsize=1024)
def _plan(expression: str) -> _Plan:
    fields = _split(expression)
    texts = [_read(text, field) for text, field in zip(fields, _FIELDS, strict=False)]
    any_hour, any_day, any_weekday = (fields[n].startswith("*") or texts[n] == "*" for n in (1, 2, 4))
    one_is_enough = not any_day and not any_weekday
    if one_is_enough and _NTH_WEEKDAY.search(fields[4]):
        # croniter would want both to match, and only here.
        raise BadOption(f"day {fields[2]} and weekday {fields[4]}: give one of both, the other as *")
    every_hour = any_hour or texts[1].count(",") == 23
    plan = _Plan(" ".join(texts), day_or=one_is_enough, every_hour=every_hour)
    _require_a_date(plan)
    return plan


def _split(expression: str) -> list[str]:
    text = expression.strip()
    if len(text) > LENGTH:
        raise BadOption(f"longer than {LENGTH} characters")
    if text.startswith("@"):
        text = ALIASES.get(text.lower(), "")
        if not text:
            raise BadOption(f"expected one of {', '.join(ALIASES)} or five fields")
    fields = text.upper().split()
    if len(fields) not in (5, 6):
        raise BadOption(
            f"expected five fields (minute hour day month weekday) or six (... second), found {len(fields)}"
        )
    return fields


def _read(text: str, field: _Field) -> str:
    """The field in numbers."""
    items = text.split(",")
    if "*" in items:
        return "*"
    if field is _WEEKDAY and any(_NTH_WEEKDAY.fullmatch(item) for item in items):
        return ",".join(_nth_weekday(item) for item in items)
    last_day = field is _DAY and "L" in items
    numbers = {number for item in items if not (last_day and item == "L") for number in _numbers(item, field)}
    if field is _WEEKDAY:
        numbers = {number % 7 for number in numbers}
    return ",".join([*map(str, sorted(numbers)), *(["L"] if last_day else [])])


def _nth_weekday(item: str) -> str:
    found = _NTH_WEEKDAY.fullmatch(item)
    if found is None:
        raise BadOption(f"weekday: {item:.20} does not go together with # or L")
    number = _number(found[1], _WEEKDAY) % 7
    return f"{number}#{found[2]}" if found[2] else f"L{number}"


def _numbers(item: str, field: _Field) -> Sequence[int]:
    found = _ITEM.fullmatch(item)
    if found is None or (found[1] == "*" and found[2]):
        raise _not_understood(item, field)
    first, last, step = found.groups()
    if step is None:
        return _range(first, last or first, field)
    if int(step) == 0:
        raise BadOption(f"{field.name}: the step of {item} is 0")
    numbers = _stepped(first, last, int(step), item, field)
    if len(numbers) == 1:
        # Some cron readers take 59/15 for */15, and */90 looks like every 90 minutes.
        raise BadOption(
            f"{field.name}: {item} matches {numbers[0]} only; write {numbers[0]}, or a smaller step"
        )
    return numbers


def _stepped(first: str, last: str | None, step: int, item: str, field: _Field) -> Sequence[int]:
    if first == "*":
        return range(field.low, field.high + 1, step)
    if last is None and field is _WEEKDAY:
        raise BadOption(f"weekday: say where {item} ends, like {first}-6/{step}")
    start = _number(first, field)
    end = field.high if last is None else _number(last, field)
    if end < start:
        raise BadOption(f"{field.name}: {item} runs over the end: list its values instead")
    return range(start, end + 1, step)


def _range(first: str, last: str, field: _Field) -> Sequence[int]:
    start, end = _number(first, field), _number(last, field)
    if start <= end:
        return range(start, end + 1)
    return [*range(start, field.high + 1), *range(field.low, end + 1)]  # FRI-MON, 22-2


def _number(text: str, field: _Field) -> int:
    if text in field.names:
        return field.names.index(text) + field.low
    if not text.isdigit():
        raise _not_understood(text, field)
    if not field.low <= int(text) <= field.high:
        raise BadOption(f"{field.name}: {text:.20} is not from {field.low} to {field.high}")
    return int(text)


def _not_understood(text: str, field: _Field) -> BadOption:
    names = f" or {field.names[0]}-{field.names[-1]}" if field.names else ""
    return BadOption(
        f"not a cron expression: {field.name}: {text:.20} is not understood; use numbers from {field.low} to "
        f"{field.high}{names}, *, a-b, a-b/step and commas"
    )


def _require_a_date(plan: _Plan) -> None:
    from croniter import CroniterBadDateError, CroniterError

    try:
        plan.walker()(_A_DAY)
    except CroniterBadDateError:
        raise BadOption("it never fires: there is no such date") from None
    except (CroniterError, ValueError) as error:
        raise BadOption(f"not a cron expression: {str(error)[:200]}") from None


@lru_cache(maxsize=1024)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # also where there is no time zone database
    try:
        if name != "localtime":  # some systems have it: whatever the machine is set to
            return ZoneInfo(name)
    except (ValueError, OSError, LookupError):  # LookupError: not found
        pass
    raise BadOption(f"{name!r:.100} is not a time zone; expected a name like Europe/Berlin or UTC")


# ---------------------------------------------------------------------- walking through time


def _next_once(walk: Walk, after: datetime, zone: tzinfo) -> datetime:
    """Every matching local time counts at its first pass; those of a gap together at its end."""
    wall = _wall(after, zone)
    while True:  # in the second pass all that the first has had comes first
        wall = walk(wall)
        first, second = _readings(wall, zone)
        instant = _change(second, first, zone) if first > second else first
        if instant > after:
            return instant


def _next_in_real_time(walk: Walk, after: datetime, zone: tzinfo) -> datetime:
    """Every instant counts whose local time matches."""
    instant = _first_shown(walk, _wall(after, zone), after + _SECOND, zone)
    turn = _turned_back(after, min(instant, after + _LONGEST_SHIFT), zone)
    if turn is None:
        return instant
    # The clock shows again what it has shown before `after`.
    return _first_shown(walk, _wall(turn, zone) - _SECOND, turn, zone)


def _first_shown(walk: Walk, wall: datetime, not_before: datetime, zone: tzinfo) -> datetime:
    """The first instant whose local time is later than `wall` and matches."""
    while True:
        wall = walk(wall)
        first, second = _readings(wall, zone)
        if first > second:
            wall = _wall(_change(second, first, zone), zone) - _SECOND
        else:
            return first if first >= not_before else second


def _readings(wall: datetime, zone: tzinfo) -> tuple[datetime, datetime]:
    """The instants of a local time by the clock before and after a change; the same if there is none.

    Of a repeated time the first is the earlier; of one that is skipped it is the later.
    """
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return first, second


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None)


def _turned_back(low: datetime, high: datetime, zone: tzinfo) -> datetime | None:
    """The instant between both at which the clock is turned back, if it is."""
    before, after = (moment.astimezone(zone).utcoffset() for moment in (low, high))
    if before is None or after is None or after >= before:
        return None
    return _change(low, high, zone)


def _change(low: datetime, high: datetime, zone: tzinfo) -> datetime:
    """The first second after `low` with the offset of `high`; both in whole seconds."""
    offset = high.astimezone(zone).utcoffset()
    while high - low > _SECOND:
        middle = (low + (high - low) / 2).replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == offset:
            high = middle
        else:
            low = middle
    return high
