"""What a batch of writes that was refused in part means."""

from __future__ import annotations

from typing import Any

import pytest
from pymongo.errors import BulkWriteError

from core4.database import only_duplicates

TWICE, FULL = {"code": 11000}, {"code": 14031}


@pytest.mark.parametrize(
    ("details", "harmless"),
    [
        ({"writeErrors": [TWICE, TWICE], "writeConcernErrors": []}, True),
        ({"writeErrors": [TWICE, FULL], "writeConcernErrors": []}, False),
        ({"writeErrors": [], "writeConcernErrors": [{"code": 64}]}, False),
        ({"writeErrors": [TWICE], "writeConcernErrors": [{"code": 64}]}, False),
    ],
    ids=["duplicates", "another error", "not durable", "duplicates and not durable"],
)
def test_only_keys_that_are_there_are_no_failure(details: dict[str, Any], harmless: bool) -> None:
    assert only_duplicates(BulkWriteError(details)) is harmless
