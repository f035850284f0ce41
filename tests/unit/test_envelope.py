"""How answers are written."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from bson import ObjectId

from core4.api.encoding import dumps
from core4.api.envelope import envelope

ID = ObjectId("5f6252b42e84fa29038a3e3f")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ID, '"5f6252b42e84fa29038a3e3f"'),
        (datetime(2026, 1, 31, 12, 0, 0, 5000, tzinfo=UTC), '"2026-01-31T12:00:00.005000"'),
        (datetime(2026, 1, 31, 13, tzinfo=timezone(timedelta(hours=1))), '"2026-01-31T12:00:00"'),
        (timedelta(minutes=1.5), "90.0"),
        ({"a": [1, None, True]}, '{"a":[1,null,true]}'),
        ({"a": float("nan"), "b": [float("inf")]}, '{"a":null,"b":[null]}'),
        (25.0, "25.0"),
        ("\u2028\n\u00e4", '"\\u2028\\n\\u00e4"'),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_json(value: Any, text: str) -> None:
    """Ids, times and numbers as core4 writes them, in one line of ASCII."""
    assert dumps(value) == text


def test_members() -> None:
    """Every answer has these, and the time has no zone."""
    body = json.loads(dumps(envelope(str(ID), 404)))

    assert {"_id", "version", "timestamp", "message", "code"} == body.keys()
    assert (body["message"], body["code"], body["_id"]) == ("Not Found", 404, str(ID))
    assert body["version"].startswith("core4-jobs/")
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is None
