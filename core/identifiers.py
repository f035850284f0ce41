"""Whom a line of the log, or of the audit, is about: the request, job or daemon that is at work just now.

What is bound belongs to the running task and to every task it starts from then on, so that objects made on
the way say it, too, without knowing it. The most specific one is the `identifier`, as core4 calls it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

REQUEST_ID = "request_id"
# The first that is bound is the `identifier`.
_ORDER = ("job_id", REQUEST_ID, "worker", "daemon")
_ACCEPTED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}")

_bound: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("core4_identifiers", default=())


def bind(fields: Mapping[str, Any]) -> None:
    """Add `fields` to what this task is about; a mapping that changes later is seen as it is then."""
    _bound.set((*_bound.get(), fields))


def about(**fields: Any) -> _Block:
    """The same for the length of a block."""
    return _Block(fields)


class _Block:
    """Around each request, and there are thousands of streams: a generator would be four times as large."""

    __slots__ = ("_fields", "_token")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        self._token = _bound.set((*_bound.get(), self._fields))

    def __exit__(self, *_: object) -> None:
        _bound.reset(self._token)


def bound() -> dict[str, Any]:
    """What the running task is about, with its `identifier`; empty outside of any."""
    fields = {name: value for each in _bound.get() for name, value in each.items() if value is not None}
    if not fields:
        return {}
    identifier = next((fields[name] for name in _ORDER if name in fields), None)
    return fields if identifier is None else {"identifier": identifier, **fields}


def request_id() -> str | None:
    """The id of the request that the running task serves."""
    found = bound().get(REQUEST_ID)
    return None if found is None else str(found)


def accepted(text: str | None) -> str | None:
    """A request id as a client sent it, None if it is not one that can be kept and shown."""
    return text if text is not None and _ACCEPTED.fullmatch(text) else None
