"""The clients of the chaos run: they enqueue, kill, restart, remove and follow over HTTP, and insist."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Sequence
from typing import Any

import requests

from tests.chaos.evidence import Event, History, Kind
from tests.helpers import BASE

TRIES = 200  # of one request; a run that needs more has another problem
PAUSE = 0.25  # seconds between two tries
NAMES = ("tests.chaos.Job", "tests.chaos.InlineJob")  # half each of the jobs that stand alone
CHAINED = ("DEFAULT:first", "DEFAULT:gather")  # which are followed by two, and wait for three


class Api:
    """One connection to whichever API answers."""

    AUTH = ("chaos", "chaos")

    def __init__(self, urls: Sequence[str], seed: int) -> None:
        self._urls, self.random = urls, random.Random(seed)
        self._session = requests.Session()
        self._session.auth = self.AUTH

    def send(self, method: str, path: str, **more: Any) -> requests.Response:
        url = self.random.choice(self._urls) + BASE + path
        return self._session.request(method, url, **{"timeout": (5, 20), **more})


class Plan:
    """When the clients go on: not while `room` is cleared, nor any more once there are `enough` jobs."""

    def __init__(self) -> None:
        self.room, self.enough = threading.Event(), threading.Event()
        self.room.set()
        self._keys = itertools.count()

    def key(self) -> int | None:
        """The key of the next job; None if there are enough."""
        self.room.wait()
        return None if self.enough.is_set() else next(self._keys)


class Client(threading.Thread):
    """Takes keys and makes a job of each; kills, restarts, removes and follows some."""

    def __init__(
        self,
        number: int,
        urls: Sequence[str],
        history: History,
        ledger: str,
        seed: int,
        plan: Plan,
        readers: list[Reader],
    ) -> None:
        super().__init__(daemon=True)
        self._name, self._urls, self._history, self._ledger = f"client{number}", urls, history, ledger
        self._plan, self._readers = plan, readers
        self._api = Api(urls, seed * 1000 + number)
        self._pause = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while (key := self._plan.key()) is not None:
                self._job(key)
        except BaseException as error:  # shown by the run
            self.failure = error

    def _job(self, key: int) -> None:
        dice = self._api.random
        job = self._enqueue(key)
        if dice.random() < 0.04:
            reader = Reader(job, self._urls, dice.randrange(10**9))
            self._readers.append(reader)
            reader.start()
        if dice.random() < 0.08:
            self._pause.wait(dice.uniform(0, 1.5))
            for action in dice.choice(
                (("kill",), ("kill", "restart"), ("remove",), ("kill", "remove"), ("restart",))
            ):
                self._control(action, job)

    def _enqueue(self, key: int) -> str:
        dice = self._api.random
        args = {
            "key": f"k{key}",
            "ledger": self._ledger,
            "seconds": dice.choice((0.0, 0.05, 0.1, 0.2, 0.4, 1.0)),
            "fails": dice.choice((0,) * 8 + (1, 2)),
            "defers": dice.choice((0,) * 12 + (1,)),
        }
        body = {"qual_name": dice.choice(NAMES), "args": args, "follow": False}
        if dice.random() < 0.1:
            few = {"key": args["key"], "ledger": args["ledger"]}
            body |= {"qual_name": dice.choice(CHAINED), "args": few}
        headers = {"Idempotency-Key": f"k{key}"} if key % 2 else {}
        for _ in range(TRIES):
            kind, job = self._ask("enqueue", f"k{key}", "POST", "/job", json=body, headers=headers)
            if kind == "ok":
                assert job is not None
                return job
            if kind == "fail":
                break  # a request that is wrong is wrong each time
            self._pause.wait(PAUSE)
        raise RuntimeError(f"job {key} was never accepted: {job}")

    def _control(self, action: str, job: str) -> None:
        more = {"json": {"follow": False}} if action == "restart" else {}
        self._ask(action, job, "PUT", f"/job/{action}/{job}", **more)

    def _ask(self, op: str, target: str, method: str, path: str, **more: Any) -> tuple[Kind, str | None]:
        number = self._history.invoke(self._name, op, target)
        try:
            response = self._api.send(method, path, **more)
            kind, result = _judged(op, response)
        except (requests.RequestException, ValueError) as error:
            self._history.answer(number, "info", f"{type(error).__name__}: {str(error)[:200]}")
            return "info", None
        self._history.answer(number, kind, result)
        return kind, result


def _judged(op: str, response: requests.Response) -> tuple[Kind, str | None]:
    """What an answer says about the request."""
    try:
        body = response.json()
    except ValueError:
        return "info", f"{response.status_code} {response.headers} {response.text[:200]!r}"
    if response.status_code == 200:
        return "ok", body["data"] if isinstance(body["data"], str) else None
    problem = f"{response.status_code} {body['type'].rpartition(':')[2]}"
    if response.status_code >= 500:
        return "info", problem
    if op == "enqueue" and problem == "409 job_exists":
        # An earlier try had arrived: that job is ours, as nobody else uses this key.
        return "ok", str(body["job_id"])
    return "fail", problem


class Reader(threading.Thread):
    """Follows one job over any number of connections, to its end."""

    def __init__(self, job: str, urls: Sequence[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.job, self.events = job, list[Event]()
        self._api = Api(urls, seed)
        self._last: str | None = None
        self._ended = False
        self._connections = 0
        self._pause = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(TRIES):
                self._connections += 1
                try:
                    self._follow()
                except (requests.RequestException, OSError):
                    pass
                if self._ended:
                    return
                self._pause.wait(PAUSE)
        except BaseException as error:  # shown by the run
            self.failure = error

    def _follow(self) -> None:
        headers = {"Last-Event-ID": self._last} if self._last else {}
        path = f"/job/follow/{self.job}"
        with self._api.send("GET", path, headers=headers, stream=True, timeout=(5, 30)) as response:
            if response.status_code == 204:
                self._ended = True
                return
            if response.status_code != 200:
                return
            lines: list[str] = []
            for line in response.iter_lines(decode_unicode=True):
                if line:
                    lines.append(line)
                else:
                    self._event(lines)
                    lines = []

    def _event(self, lines: Sequence[str]) -> None:
        fields = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] != ":")
        if "event" not in fields:
            return
        rev, _, seq = fields["id"].partition(".")
        data = json.loads(fields["data"])
        kind = fields["event"]
        number = int(data["seq"]) if kind == "log" else int(seq)
        self.events.append(
            Event(self._connections, kind, int(data["rev"]) if kind == "state" else int(rev), number)
        )
        self._last = fields["id"]
        self._ended = kind == "close"


__all__ = ["Api", "Client", "Plan", "Reader"]
