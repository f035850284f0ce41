"""The options of a job: one table for class declarations, enqueue requests and stored documents.

Loads nothing but the interpreter: job authors' modules import it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

PRIORITY_LIMIT = 1000  # what fits into `rank` beside force and the enqueue time, see core4.jobs
DEBUG = "_debug"  # namespace of the jobs that no worker runs but one that was started for them


@dataclass(frozen=True)
class Option:
    """One option: its default, what is accepted (in words), the check, and what is stored of a value."""

    default: Any
    accepts: str
    check: Callable[[Any], bool]
    stored: Callable[[Any], Any] = lambda value: value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seconds(default: float | None, *, nullable: bool = False, zero: bool = False) -> Option:
    def check(value: Any) -> bool:
        if value is None:
            return nullable
        return _is_number(value) and (value > 0 or (zero and value == 0)) and value <= 10 * 365 * 86400

    words = f"seconds {'from' if zero else 'above'} 0, ten years at most" + (", or null" if nullable else "")
    return Option(default, words, check)


def _choice(default: str, *others: str) -> Option:
    words = (default, *others)
    return Option(default, "one of " + ", ".join(words), lambda v: isinstance(v, str) and v in words)


_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]i?)?B?", re.ASCII)
_LEAST_MEMORY, _MOST_MEMORY = 1024**2, 1024**5


def _bytes(value: Any) -> int | None:
    """Bytes of a number or of text like 512MB (10^6) or 1.5 GiB (2^30).

    Raises: ValueError.
    """
    if value is None or _is_int(value):
        return value  # type: ignore[no-any-return]
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(value)
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))


def _is_memory(value: Any) -> bool:
    try:
        size = _bytes(value)
    except ValueError:
        return False
    return size is None or _LEAST_MEMORY <= size <= _MOST_MEMORY


_RATE = re.compile(r"([0-9]{1,4})/([0-9]{1,7}(?:\.[0-9]{1,3})?)?([smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Rate:
    """At most `count` starts in any `seconds`."""

    count: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Rate:
        """The rate that a text like 10/60s or 10/m stands for.

        Raises: ValueError.
        """
        match = _RATE.fullmatch(text)
        if match is None:
            raise ValueError(text)
        rate = cls(int(match[1]), float(match[2] or 1) * _UNITS[match[3]])
        if not (1 <= rate.count <= 1000 and 0.1 <= rate.seconds <= 31 * 86400):
            raise ValueError(text)
        return rate

    def __str__(self) -> str:
        return f"{self.count}/{self.seconds:.10g}s"

    def free_at(self, starts: Sequence[datetime], now: datetime) -> datetime:
        """When there may be the next start after these, in order: `now`, or later."""
        if len(starts) < self.count:
            return now
        return max(now, starts[-self.count] + timedelta(seconds=self.seconds))

    def left(self, starts: Sequence[datetime], now: datetime) -> int:
        """How many starts there may be now."""
        window = now - timedelta(seconds=self.seconds)
        return max(self.count - sum(start > window for start in starts), 0)


def _is_rate(value: Any) -> bool:
    try:
        return value is None or (isinstance(value, str) and bool(Rate.parse(value)))
    except ValueError:
        return False


QUEUE_NAME = re.compile(r"(?!amq\.)[A-Za-z0-9_.:-]{1,100}")  # brokers keep amq. for themselves
_MOST_QUEUES = 10


def _are_queues(value: Any) -> bool:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list | tuple) or len(names) > _MOST_QUEUES:
        return False
    return all(isinstance(name, str) and QUEUE_NAME.fullmatch(name) for name in names)


def _queues(value: Any) -> list[str] | None:
    return list(dict.fromkeys([value] if isinstance(value, str) else value or ())) or None


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "attempts": Option(1, "an int from 1 to 10,000", lambda v: _is_int(v) and 1 <= v <= 10_000),
        "error_time": _seconds(600, zero=True),
        "backoff": Option(1, "a number from 1 to 100", lambda v: _is_number(v) and 1 <= v <= 100),
        "error_time_max": _seconds(86400),
        "max_crashes": Option(
            None,
            "an int from 1 to 100, or null for the worker's setting",
            lambda v: v is None or (_is_int(v) and 1 <= v <= 100),
        ),
        "jitter": Option(0, "a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
        "defer_time": _seconds(300),
        "defer_max": _seconds(3600),
        "zombie_time": _seconds(1800),
        "wall_time": _seconds(None, nullable=True),
        "zombie_action": _choice("flag", "kill"),
        "wall_action": _choice("flag", "kill"),
        "timeout": _seconds(None, nullable=True),
        "memory_limit": Option(
            None, "bytes, or text like 512MB or 2 GiB, from 1 MiB to 1 PiB, or null", _is_memory, _bytes
        ),
        "progress_interval": _seconds(5),
        "max_parallel": Option(
            15, "an int above 0, or null", lambda v: v is None or (_is_int(v) and 0 < v <= 2**31)
        ),
        "max_running": Option(
            None, "an int from 1 to 1,000, or null", lambda v: v is None or (_is_int(v) and 1 <= v <= 1000)
        ),
        "max_running_key": Option(
            None,
            "1 to 200 printable characters, or null",
            lambda v: v is None or (isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable()),
        ),
        "rate_limit": Option(
            None,
            "text like 10/60s, 10/m or 500/1.5h (1 to 1,000 starts within 0.1 s to 31 days), or null",
            _is_rate,
            lambda value: None if value is None else str(Rate.parse(value)),
        ),
        "priority": Option(
            0,
            f"an int from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}",
            lambda v: _is_int(v) and -PRIORITY_LIMIT <= v <= PRIORITY_LIMIT,
        ),
        "force": Option(False, "true or false", lambda v: isinstance(v, bool)),
        "worker": Option(
            None,
            "a worker's name like worker@host (1 to 200 characters), or null",
            lambda v: v is None or (isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable()),
        ),
        "return_queues": Option(
            None,
            f"a name or up to {_MOST_QUEUES} of them, each 1 to 100 of A-Z a-z 0-9 _ . : -, or null",
            _are_queues,
            _queues,
        ),
    }
)

DEFAULTS: Mapping[str, Any] = MappingProxyType({name: option.default for name, option in OPTIONS.items()})
_STORED = {name: option.stored(option.default) for name, option in OPTIONS.items()}


def problem(name: str, value: Any) -> str | None:
    """Why `value` is not accepted for the option `name`; None if it is."""
    option = OPTIONS[name]
    if option.check(value):
        return None
    return f"{name} is {shown(value)}, expected {option.accepts}"


def shown(value: Any) -> str:
    """The beginning of a value, for a message; also of one that is nested too deep to be written."""
    try:
        return f"{value!r:.100}"
    except RecursionError:
        return "nested without end"


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """All options as a document has them: accepted values, defaults for what is not among them."""
    given = {name: OPTIONS[name].stored(value) for name, value in values.items() if name in OPTIONS}
    return {**_STORED, **given}
