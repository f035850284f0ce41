"""The API does what its description says: generated requests, and answers held against the schemas.

``CORE4_TEST_SCHEMA_CASES`` says how many of each kind each operation gets.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import pytest
import schemathesis
from bson import ObjectId
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from core4.retries import Outcome
from core4.signatures import schema as signature
from tests.integration.driver import ADMIN, Api, Runner

CASES = int(os.environ.get("CORE4_TEST_SCHEMA_CASES", "5"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def example(n: int, word: str = "x", rows: list[str] | None = None, **more: Any) -> None:
    """Do something."""


limits = settings(
    max_examples=CASES,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class Attack:
    """Sends what schemathesis makes of a description; every second id is that of a job."""

    def __init__(self, document: dict[str, Any], url: str, job_ids: list[ObjectId]) -> None:
        self._schema = schemathesis.openapi.from_dict(document)
        self._url = url
        self._ids = itertools.cycle([*map(str, job_ids), None])
        self.sent = 0
        self.statuses: set[int] = set()

    def run(self) -> None:
        for result in self._schema.get_all_operations():
            assert isinstance(result, Ok)
            for mode in GenerationMode:
                strategy = result.ok().as_strategy(generation_mode=mode)
                # Nothing can be wrong where nothing is asked for.
                with suppress(SkipTest, Unsatisfiable):
                    limits(given(case=strategy)(self._send))()

    def _send(self, case: schemathesis.Case[Any]) -> None:
        known = next(self._ids)
        if "_id" in case.path_parameters and known:
            case.path_parameters["_id"] = known
        if case.path.endswith("/restart/{_id}"):
            case.body = {"follow": False}  # nobody runs what is restarted: its stream would not end
        if case.path.endswith("/doctor"):
            # It would look twice, that many seconds apart.
            if case.method == "GET":
                case.query = {"patience": 0}
            else:
                case.body = {"patience": 0}
        response = case.call(base_url=self._url, auth=ADMIN, timeout=120)
        case.validate_response(response, checks=CHECKS)
        self.sent += 1
        self.statuses.add(response.status_code)


@pytest.mark.timeout(900)
async def test_nothing_is_answered_that_is_not_described(api: Api, runner: Runner) -> None:
    """No 5xx, no status, media type or body outside of the schema, whatever is sent."""
    await runner.publish("tests.Job", schema=signature(example))
    ids: list[ObjectId] = []
    for outcome in (Outcome.complete({"n": 1}), Outcome.failed("no", ["line\n"])):
        answer = await api.call("POST", f"/DEFAULT/task/tests.Job?n={len(ids)}&attempts=1")
        ids.append(ObjectId(answer.data))
        attempt = await runner.start()
        await attempt.log("a line")
        await attempt.finish(outcome)
    document = (await api.call("GET", "/openapi.json")).body
    attack = Attack(document, api.root, ids)

    await asyncio.to_thread(attack.run)

    assert attack.sent > 250
    assert {200, 400, 404, 422} <= attack.statuses
