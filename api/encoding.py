"""JSON as core4 writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId


def dumps(value: Any) -> str:
    """One line of compact JSON: ids as hex, times as ISO in UTC without zone, durations in seconds."""
    try:
        return _encode(value)
    except ValueError:
        # Results may hold numbers that JSON has no word for.
        return _encode(_finite(value))


def _encode(value: Any) -> str:
    return _encoder.encode(value)


def _plain(value: Any) -> Any:
    if isinstance(value, ObjectId):
        return str(value)
    if isinstance(value, datetime):
        if value.tzinfo is not None and value.tzinfo is not UTC:
            value = value.astimezone(UTC)
        return value.isoformat().removesuffix("+00:00")
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ASCII only: no line separator of any kind can end a frame of a stream too early. Made once: `json.dumps`
# makes one for each call with options. What comes from JSON or BSON does not contain itself.
_encoder = json.JSONEncoder(
    default=_plain, separators=(",", ":"), ensure_ascii=True, allow_nan=False, check_circular=False
)
