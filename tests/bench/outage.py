"""``python -m tests.bench.outage``: kill -9 of the database in the middle of a drain; how many jobs are lost.

Speed that was bought with durability would show here. Clients enqueue over HTTP while workers drain; each job
whose enqueue was acknowledged has to be in the journal once, complete, with one outcome. A process is killed,
not the machine: what the server has handed to the kernel stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import requests

from core4.states import State
from core4.store import JOURNAL, QUEUE
from tests.bench.stand import Stand, stand
from tests.chaos.parts import Server
from tests.helpers import ADMIN, BASE

Document = dict[str, Any]
CLIENTS = 4
PATIENCE = 900.0  # seconds for each part of the run
NAMES = ("tests.jobs.InlineNap", "tests.jobs.Nap")  # every tenth in a process


class Clients:
    """Enqueue from several threads until so many jobs were acknowledged; nothing is sent twice."""

    def __init__(self, here: Stand, jobs: int) -> None:
        self._url, self._jobs = f"http://127.0.0.1:{here.port}{BASE}/job", jobs
        self._numbers = count()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        self.acknowledged: dict[str, int] = {}
        self.unanswered = 0
        self.refused: list[str] = []  # answers that an outage does not explain

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for all answers."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{len(self.acknowledged)} of {self._jobs} were acknowledged"

    def _run(self) -> None:
        session = requests.Session()
        session.auth = ADMIN
        while len(self.acknowledged) < self._jobs and not self.refused:
            number = next(self._numbers)
            args = {"n": number, "seconds": 0.05}
            body = {"qual_name": NAMES[number % 10 == 0], "args": args, "follow": False}
            try:
                answer = session.post(self._url, json=body, timeout=(5, 120))
            except requests.RequestException:
                self.unanswered += 1
                continue
            if answer.status_code == 200:
                self.acknowledged[answer.json()["data"]] = number
            elif answer.status_code == 503:
                self.unanswered += 1
                time.sleep(0.2)
            else:
                self.refused.append(answer.text[:500])


def outages(here: Stand, clients: Clients, jobs: int, kills: int) -> list[float]:
    """Kill the database at equal distances of the drain; seconds from each kill to the next job's end."""
    assert isinstance(here.server, Server)
    pauses = []
    for number in range(1, kills + 1):
        _wait(partial(_under_way, here, clients, jobs * number // (kills + 1)), "a drain under way")
        start = time.monotonic()
        here.server.kill()
        before = here.journaled()
        _wait(partial(_grown, here, before), "jobs that end after the kill")
        pauses.append(time.monotonic() - start)
        print(
            f"kill {number}: {before} jobs were in the journal, the next {pauses[-1]:.1f} s later", flush=True
        )
    return pauses


def _under_way(here: Stand, clients: Clients, jobs: int) -> bool:
    """True as soon as so many were acknowledged, if some have ended and others have not."""
    acknowledged = len(clients.acknowledged)
    return acknowledged >= jobs and 0 < here.journaled() < acknowledged


def _grown(here: Stand, before: int) -> bool:
    return here.journaled() > before


def _wait(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not look():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


def verdict(acknowledged: dict[str, int], journal: Sequence[Document], queued: int) -> Document:
    """Which of the acknowledged jobs are not there, not complete, or there more than once."""
    rows = {str(row["_id"]): row for row in journal}
    numbers = Counter(row["args"]["n"] for row in journal)
    there = [job for job in acknowledged if job in rows]
    return {
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged) - len(there),
        "incomplete": sum(rows[job]["state"] != State.COMPLETE for job in there),
        "twice": sum(numbers[acknowledged[job]] > 1 or outcomes(rows[job]) > 1 for job in there),
        "left": queued,
        "again": sum(rows[job]["trial"] > 1 for job in there),
        "journal": len(journal),
    }


def outcomes(row: Document) -> int:
    """How many attempts are on record with an end that was the job's last."""
    return sum(entry["state"] == State.COMPLETE for entry in row["history"])


def run(options: argparse.Namespace) -> Document:
    """The whole run: what became of the jobs."""
    with stand(options.workers, embedded=Server) as here:
        clients, start = Clients(here, options.jobs), time.monotonic()
        clients.start()
        pauses = outages(here, clients, options.jobs, options.kills)
        clients.join()
        _wait(lambda: here.tables[QUEUE].count_documents({}) == 0, "an empty queue")
        found = verdict(clients.acknowledged, list(here.tables[JOURNAL].find()), 0)
        seconds = time.monotonic() - start
        more = {"server": here.kind, "workers": options.workers, "pauses": pauses, "seconds": seconds}
        return {**found, **more, "unanswered": clients.unanswered, "refused": clients.refused}


def main() -> None:
    """Run, print what became of the jobs, write the JSON; exit code 1 if one was lost or is there twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.outage", description=__doc__)
    parser.add_argument("--jobs", type=int, default=400, help="acknowledged enqueues (default: 400)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=1, help="of the database (default: 1)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    found = run(options)
    for name, value in found.items():
        print(f"{name:14}{value}")
    bad = sum(found[name] for name in ("lost", "incomplete", "twice")) + len(found["refused"])
    print(f"{found['lost']} lost of {found['acknowledged']}; {found['twice']} twice")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
