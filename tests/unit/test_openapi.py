"""The description of the API without a running one."""

from __future__ import annotations

from typing import Any

import pytest
from openapi_spec_validator import validate

from core4.api.answers import ANSWERS
from core4.api.openapi import describe
from core4.api.routes import ROUTES


def test_every_handler_says_what_it_answers() -> None:
    """A new handler needs its row in `ANSWERS`, and none is left of one that is gone."""
    assert {route.handler for route in ROUTES if route.method != "*"} == set(ANSWERS)


@pytest.mark.parametrize(
    "entry",
    [
        {"_id": "bare.Job"},
        {"_id": "odd/{name}?#é", "namespace": "odd", "doc": "", "schema": None},
        {"_id": "ns:f", "namespace": "ns", "schema": {"type": "object", "additionalProperties": True}},
        {"_id": "x.Y", "schema": {"properties": {"a": {"x-python": "Any"}, "b": {"enum": ["x", 1]}}}},
    ],
)
def test_whatever_is_published_it_is_valid(entry: dict[str, Any]) -> None:
    """An entry of the catalogue is what some worker has sent."""
    document = describe([entry])

    validate(document)
    assert len(document["paths"]) == len(describe()["paths"]) + 1
