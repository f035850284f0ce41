"""What may be said of a schedule, by a job's author or an operator: one table, and its checks. Pure.

Loads nothing but the interpreter and croniter when there is an expression: authors' modules import it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from core4 import cron, options
from core4.errors import BadOption, UnknownOption
from core4.options import OPTIONS, Option

LIMIT = 1000  # most missed instants that a schedule may make up for
# The API has an address for each beside that of the schedules: no name may begin with one.
VERBS = ("pause", "resume", "trigger", "reset")
PREVIEW = "next"

_NAME = re.compile(r"[\w.:@/-]{1,200}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,100}")
_INT64 = 2**63
_DEPTH = 32


def _is_options(value: Any) -> bool:
    return isinstance(value, Mapping) and all(name in OPTIONS for name in value)


def _is_args(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_json(value, _DEPTH)


def _is_json(value: Any, depth: int) -> bool:
    """JSON, and no numbers or texts that the database cannot take."""
    if isinstance(value, str):
        return _is_text(value)
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    if isinstance(value, float):
        return math.isfinite(value)
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return all(
            isinstance(key, str) and "\0" not in key and _is_text(key) and _is_json(item, depth - 1)
            for key, item in value.items()
        )
    return isinstance(value, list | tuple) and all(_is_json(item, depth - 1) for item in value)


def _is_text(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


# What code and operator may say of a schedule.
FIELDS: Mapping[str, Option] = MappingProxyType(
    {
        "qual_name": Option(None, "the name of a job", lambda v: isinstance(v, str) and 0 < len(v) <= 200),
        "expression": Option(None, "a cron expression", lambda v: isinstance(v, str)),
        "zone": Option("UTC", "a time zone like Europe/Berlin", lambda v: isinstance(v, str)),
        "args": Option({}, "a JSON object", _is_args),
        "options": Option({}, f"a mapping with some of {', '.join(OPTIONS)}", _is_options),
        "namespace": Option(
            None,
            "1 to 100 of A-Z a-z 0-9 _ -, or null",
            lambda v: v is None or (isinstance(v, str) and bool(_NAMESPACE.fullmatch(v))),
        ),
        "missed": Option("one", "skip, one or all", lambda v: v in ("skip", "one", "all")),
        "limit": Option(
            100,
            f"an int from 1 to {LIMIT}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= LIMIT,
        ),
        "max_age": Option(
            None,
            "seconds above 0, or null",
            lambda v: (
                v is None
                or (isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 10 * 365 * 86400)
            ),
        ),
        "enabled": Option(True, "true or false", lambda v: isinstance(v, bool)),
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType({name: field.default for name, field in FIELDS.items()})


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, the expression in its normal form.

    Raises: UnknownOption, BadOption.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            raise UnknownOption(f"{name} is not a field of a schedule; there are {', '.join(FIELDS)}")
        if not FIELDS[name].check(value):
            raise BadOption(f"{name} is {options.shown(value)}, expected {FIELDS[name].accepts}")
    good = dict(fields)
    if "expression" in good:
        try:
            good["expression"] = cron.normalise(good["expression"])
        except BadOption as error:
            raise BadOption(f"expression is {good['expression']!r:.100}: {error.detail}") from None
    if "zone" in good:
        cron.validate_zone(good["zone"])
    for name, value in good.get("options", {}).items():
        if problem := options.problem(name, value):
            raise BadOption(problem)
    return good


def check_name(name: Any) -> None:
    """Check the name of a schedule, which is a part of its address.

    Raises: BadOption with the reason.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadOption(f"name is {name!r:.100}, expected 1 to 200 letters, digits and . : @ / _ -")
    steps = name.split("/")
    if {"", ".", ".."} & set(steps):
        raise BadOption(f"name is {name!r}: between two / there must be more than dots")
    if name == PREVIEW or (steps[0] in VERBS and len(steps) > 1):
        raise BadOption(f"name is {name!r}: that is an address of its own, choose another one")


def declaration(schedule: Any) -> dict[str, Any]:
    """What a job class says of its schedule, an expression or a mapping, as checked fields.

    A mapping has an ``expression`` and any other of `FIELDS` but ``qual_name``, which is the job's, and
    perhaps the schedule's ``name``.

    Raises: UnknownOption, BadOption.
    """
    fields = {"expression": schedule} if isinstance(schedule, str) else dict(schedule)
    if "qual_name" in fields:
        raise BadOption("a class schedules itself: leave qual_name out")
    if "expression" not in fields:
        raise BadOption(f"a schedule needs its expression: {FIELDS['expression'].accepts}")
    name = {"name": fields.pop("name")} if "name" in fields else {}
    if name:
        check_name(name["name"])
    return {**name, **checked(fields)}
