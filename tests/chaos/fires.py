"""The schedules of a chaos run, and what they must have fired, computed without the product."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import requests

from tests.chaos.checker import fire_id
from tests.chaos.http import Api
from tests.helpers import eventually

PERIODS: Mapping[str, int] = {"chaos/two": 2, "chaos/three": 3}  # seconds; they divide the minute
NAME = "tests.chaos.Job"
CAUGHT_UP = 120.0  # seconds until everything missed must have been made up for


class Fires:
    """Makes the schedules, pauses them in the end."""

    def __init__(self, urls: Sequence[str], ledger: str) -> None:
        self._api, self._ledger = Api(urls, 0), ledger
        self._must_until: datetime | None = None

    def begin(self) -> None:
        """Make the schedules; they make up for every instant that is missed."""
        for name, period in PERIODS.items():
            args = {"key": "fire", "ledger": self._ledger, "seconds": 0.05}
            fields = {"expression": f"* * * * * */{period}", "missed": "all", "limit": 1000, "args": args}
            self._insist("PUT", f"/schedule/{name}", json={"qual_name": NAME, **fields})

    def end(self) -> None:
        """When all that was due by now is decided: no more."""
        self._must_until = datetime.fromtimestamp(time.time(), UTC)
        for name in PERIODS:
            eventually(partial(self._is_decided, name), CAUGHT_UP, what=f"all fires of {name}", every=0.5)
            self._insist("PUT", f"/schedule/pause/{name}")

    def ids(self, schedules: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], frozenset[str]]:
        """What must have been fired, and what may have been besides: between the last look and the pause."""
        must, may = set[str](), set[str]()
        assert self._must_until is not None
        for document in schedules:
            begin, end = (document[name].replace(tzinfo=UTC) for name in ("created_at", "cursor"))
            for instant in _instants(begin, end, PERIODS[document["_id"]]):
                found = must if instant <= self._must_until else may
                found.add(fire_id(document["_id"], instant))
        return frozenset(must), frozenset(may)

    def _is_decided(self, name: str) -> bool:
        cursor = datetime.fromisoformat(self._insist("GET", f"/schedule/{name}")["cursor"])
        assert self._must_until is not None
        return cursor.replace(tzinfo=UTC) >= self._must_until - timedelta(seconds=PERIODS[name])

    def _insist(self, method: str, path: str, **more: Any) -> Any:
        def answer() -> requests.Response | None:
            try:
                response = self._api.send(method, path, **more)
            except requests.RequestException:
                return None
            return response if response.status_code < 500 else None

        response = eventually(answer, CAUGHT_UP, what=f"an answer to {method} {path}", every=0.25)
        assert response is not None
        assert response.status_code == 200, response.text
        return response.json()["data"]


def _instants(begin: datetime, end: datetime, period: int) -> Iterator[datetime]:
    """The multiples of `period` seconds behind `begin`, up to `end`."""
    seconds = int(begin.timestamp()) // period * period + period
    while seconds <= end.timestamp():
        yield datetime.fromtimestamp(seconds, UTC)
        seconds += period
