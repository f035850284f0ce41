"""What is given of many possible arguments is loaded as if all had been looked for."""

from __future__ import annotations

from typing import Any

import pytest
from marshmallow import Schema, ValidationError

from core4.api.arguments import checked
from core4.errors import BadRequest
from core4.schemas import BatchJob, EnqueueArguments, JobListArguments, NoArguments

JOB = {"qual_name": "a.Job"}


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        (EnqueueArguments, JOB),
        (EnqueueArguments, {**JOB, "args": {"follow": 1}, "follow": "no", "priority": "3", "attempts": 2}),
        (BatchJob, {**JOB, "key": "k"}),
        (JobListArguments, {}),
        (JobListArguments, {"cursor": "x"}),
        (NoArguments, {}),
    ],
)
def test_what_is_accepted(schema: type[Schema], given: dict[str, Any]) -> None:
    """Defaults of what is not given are there, too, and a second time nothing of the first."""
    for _ in range(2):
        assert checked(schema, given) == schema().load(given)


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        (EnqueueArguments, {}),
        (EnqueueArguments, {"args": 1, "priority": "x", "nothing": 1}),
        (EnqueueArguments, {**JOB, "follow": None, "attempts": 0}),
        (BatchJob, {**JOB, "follow": False}),
        (JobListArguments, {"cursor": "x", "page": 2}),
        (NoArguments, {"x": 1}),
    ],
)
def test_what_is_refused(schema: type[Schema], given: dict[str, Any]) -> None:
    """All that is wrong is named: what is missing, what nobody knows, what does not fit."""
    with pytest.raises(ValidationError) as expected:
        schema().load(given)
    with pytest.raises(BadRequest) as caught:
        checked(schema, given)
    assert caught.value.detail.count(";") == sum(map(len, expected.value.messages_dict.values())) - 1
    assert all(name in caught.value.detail for name in expected.value.messages_dict if name != "_schema")
