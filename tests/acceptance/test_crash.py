"""kill -9 of worker, API and database in turn while they hold work: nothing lost, nothing recorded twice."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from tests.helpers import BASE, ROOT, Stack, eventually, running_stack

JOBS, ROUNDS = 200, 2
PARTS = {"worker": "worker", "api": "api", "database": "secantusd"}


def part(stack: Stack, name: str) -> psutil.Process:
    """The process of this part of the stack."""
    children = psutil.Process(stack.command.process.pid).children()

    def is_part(process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:  # it has just ended
            return False
        if name == "database":
            return any("secantusd" in word or "mongod" in word for word in words)
        return words[-3:] == ["-m", "core4", name]

    found = [child for child in children if is_part(child)]
    assert found, f"no {name} among {children}"
    return found[0]


def is_new(stack: Stack, name: str, old: int) -> bool:
    """True if another process has taken this part's place."""
    return part(stack, name).pid != old


class Enqueuer(threading.Thread):
    """Enqueues until `JOBS` were acknowledged; what got no answer is counted, not repeated."""

    def __init__(self, stack: Stack, ledger: Path) -> None:
        super().__init__(daemon=True)
        self._stack, self._ledger = stack, ledger
        self.acknowledged: list[str] = []
        self.unanswered = 0

    def run(self) -> None:
        for n in itertools.count():
            if len(self.acknowledged) == JOBS:
                return
            body = {
                "qual_name": "tests.jobs.LedgerJob",
                "args": {"ledger": str(self._ledger), "n": n},
                "follow": False,
            }
            try:
                answer = requests.post(
                    self._stack.url + BASE + "/job", json=body, auth=self._stack.auth, timeout=(5, 60)
                )
            except requests.RequestException:
                self.unanswered += 1
                continue
            if answer.status_code == 200:
                self.acknowledged.append(answer.json()["data"])
            else:
                assert answer.status_code == 503, answer.text
                self.unanswered += 1


def holds_work(stack: Stack) -> bool:
    """True while a job is running."""
    try:
        counts = stack.data("GET", "/job/count")
    except requests.RequestException as error:
        raise AssertionError(str(error)) from error
    return bool(counts.get("running"))


@pytest.mark.timeout(400)
def test_kill_nine_of_each_part(tmp_path: Path) -> None:
    """After every part came back, each acknowledged job is final, once, by the attempt that says so."""
    ledger = tmp_path / "ledger"
    with running_stack(tmp_path, ROOT / "tests/jobs/ledger.py", CORE4_SLOTS="4") as stack:
        enqueuer = Enqueuer(stack, ledger)
        enqueuer.start()
        for name in [*PARTS] * ROUNDS:
            eventually(lambda: holds_work(stack), 60, what=f"a running job before the kill of {name}")
            victim = part(stack, name)
            victim.kill()
            eventually(partial(is_new, stack, name, victim.pid), 60, what=f"a new {name}")
        enqueuer.join(180)
        assert len(enqueuer.acknowledged) == JOBS

        def drained() -> bool:
            counts = stack.data("GET", "/job/count")
            assert not {state: n for state, n in counts.items() if n and state != "journal"}
            return True

        eventually(drained, 120, what="an empty queue")
        jobs = [stack.job(job_id) for job_id in enqueuer.acknowledged]
    events = [line.split() for line in ledger.read_text().splitlines()]
    ends = {(job, int(attempt)) for kind, job, attempt in events if kind == "end"}
    starts = Counter(job for kind, job, _ in events if kind == "start")
    for job in jobs:
        assert job["state"] == "complete", job
        assert job["journal"] is True
        outcomes = [entry for entry in job["history"] if entry["lease"] and entry["state"] != "running"]
        assert len(outcomes) == 1, job["history"]
        assert (job["_id"], job["trial"]) in ends
        assert starts[job["_id"]] <= 1 + job["crashes"] + sum(
            entry["state"] == "pending" for entry in job["history"]
        )
