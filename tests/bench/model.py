"""``python -m tests.bench.model``: what a job, a worker, a request and a follower cost in processor time.

Each point of a grid is a load on a database server, an API and workers of their own. Their processor time is
fitted by what was done there (least squares); loads that are not in the grid are measured in between, and
predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import requests
from bson import ObjectId

from core4 import jobs
from core4.catalogue import CATALOGUE
from core4.jobs import Job, JobOrder, utcnow
from core4.logs import Line
from core4.store import COUNT_SHARE, QUEUE, SPANNED
from tests.bench.fit import fitted, predicted
from tests.bench.sockets import Listeners, ask, listening, request
from tests.bench.stand import AUTH, SLOTS, Pace, Stand, stand
from tests.helpers import ADMIN, BASE

Document = dict[str, Any]

PATIENCE = 400.0  # seconds for one point
SETTLED = 4.0  # seconds after which nobody is busy with the start any more
LEAST = 0.5  # seconds of processor time: smaller ones are known no better than this
PARTS = ("db", "worker", "api")
TERMS: Mapping[str, Sequence[str]] = {
    "db": (
        "second",
        "worker_second",
        "inline_job",
        "inline_call",
        "process_job",
        "job_second",
        "job_heard",
        "post",
        "line",
        "page",
        "entry_read",
        "page_in_spans",
        "entry_counted",
    ),
    "worker": ("worker_second", "inline_job", "inline_call", "process_job", "job_second", "job_heard"),
    "api": ("second", "job", "post", "line", "frame", "page", "page_in_spans"),
}
MEANING = {
    "second": "a second, whatever happens",
    "worker_second": "a second of a worker that has nothing to do",
    "inline_job": "an inline job: what is written for it",
    "inline_call": "the calls of an inline job, shared with those that are under way with it",
    "process_job": "a job in a process, many under way",
    "job": "a job that a worker runs: its changes are heard",
    "job_second": "a second of a job's body: its lease is renewed",
    "job_heard": "a job's changes, heard by one worker",
    "post": "an enqueue over HTTP",
    "line": "a line of a followed job, stored and read once",
    "frame": "a line to one follower",
    "page": "a page of the journal, newest first",
    "entry_read": f"an entry in a journal of up to {SPANNED:,}, per page",
    "page_in_spans": "a page of a larger one, beside that",
    "entry_counted": "an entry in a larger one, each time that all are counted",
}


@dataclass(frozen=True)
class Load:
    """What is done at a point. Jobs that wait at the beginning are drained; `paced` ones come over HTTP."""

    name: str
    workers: int = 1
    seconds: float = 12.0  # at least so long
    inline: int = 0  # jobs that wait
    process: int = 0
    paced: int = 0  # inline jobs, spread over `seconds`; without a worker they stay where they are
    length: float = 0.0  # seconds of each job's body
    followers: int = 0
    lines: int = 0  # that they are sent, one after the other
    pages: int = 0
    entries: int = 0  # in the journal before

    @property
    def jobs(self) -> int:
        """Jobs that are run."""
        return self.inline + self.process + (self.paced if self.workers else 0)

    def counts(self, seconds: float) -> dict[str, float]:
        """How often each term occurred. Of paced jobs each is alone; of drained ones all slots are taken."""
        paced = self.paced if self.workers else 0
        large = self.entries > SPANNED
        return {
            "second": seconds,
            "worker_second": seconds * self.workers,
            "inline_job": self.inline + paced,
            "inline_call": self.inline / SLOTS + paced,
            "process_job": self.process,
            "job": self.jobs,
            "job_second": self.jobs * self.length,
            "job_heard": self.jobs * self.workers,
            "post": self.paced,
            "line": self.lines,
            "frame": self.lines * self.followers,
            "page": self.pages,
            "entry_read": 0 if large else self.pages * self.entries,
            "page_in_spans": self.pages if large else 0,
            "entry_counted": self.entries if large else 0,  # no load lasts until it would be done again
        }


GRID = (
    Load("enqueue only, no worker", 0, 20, paced=120),
    Load("80 lines, 50 followers", 0, 20, followers=50, lines=80),
    Load("80 lines, 500 followers", 0, 20, followers=500, lines=80),
    Load("pages of 200 entries", 0, 10, pages=150, entries=200),
    Load("pages of 1,500 entries", 0, 10, pages=60, entries=1_500),
    Load("pages of 10,000 entries", 0, 10, pages=40, entries=10_000),
    Load("pages of 50,000 entries", 0, 10, pages=40, entries=50_000),
    Load("idle, 1 worker", 1, 30),
    Load("inline, 1 worker", 1, inline=100),
    Load("process, 1 worker", 1, process=40),
    Load("1 job/s, 1 worker", 1, 30, paced=30),
    Load("inline, 2 workers", 2, inline=120),
    Load("inline of 1 s, 2 workers", 2, inline=120, length=1.0),
    Load("process of 1 s, 2 workers", 2, process=50, length=1.0),
    Load("2 jobs/s, 2 workers", 2, 25, paced=50),
    Load("idle, 4 workers", 4, 30),
    Load("inline, 4 workers", 4, inline=160),
    Load("process, 4 workers", 4, process=60),
)
# None of them is in the grid, and each mixes what is apart there. Each part has enough to do to be measured.
UNSEEN = (
    Load("1 worker, 80 inline, pages of 5,000", 1, 20, inline=80, pages=30, entries=5_000),
    Load("2 workers, 40 process, 200 followers", 2, 20, process=40, length=0.3, followers=200, lines=100),
    Load("3 workers, 150 inline and 3 jobs/s", 3, 20, inline=150, length=0.5, paced=60),
)
WARM = 4  # jobs of each kind and worker before anything is measured: what only the first one loads


@dataclass
class Point:
    """What was measured at a load: processor time of each part, in seconds of the machine as it was.

    Its pace is told and not divided out: loads that were measured again changed half as much as the loop did,
    and the three that were not fitted were predicted worse with it.
    """

    load: Load
    seconds: float
    pace: float  # seconds of the loop that is always the same
    used: dict[str, float]
    unseen: bool = False

    @property
    def counts(self) -> dict[str, float]:
        return self.load.counts(self.seconds)


# ---------------------------------------------------------------------- loads


class Driver:
    """Puts one load on a stand."""

    def __init__(self, here: Stand, load: Load, numbers: Iterator[int]) -> None:
        self.here, self.load = here, load
        self._numbers = numbers  # of jobs: no two are the same
        self._errors: list[BaseException] = []

    def point(self, *, unseen: bool) -> Point:
        """Run the load, and what it used."""
        load, here = self.load, self.here
        with ExitStack() as stack:
            if load.entries:
                here.fill(max(load.entries - here.journaled(), 0))
            clients, job = self._followers(stack)
            self._warm()
            time.sleep(SETTLED)
            pace = Pace()
            before, start = here.clock(), time.monotonic()
            pace.start()
            self._drained()
            self._beside(self._paced, self._paged, lambda: self._lines(clients, job))
            self._wait()
            time.sleep(max(start + load.seconds - time.monotonic(), 0.0))
            seconds, after = time.monotonic() - start, here.clock()
            used = {part: after[part] - before[part] for part in before}
            return Point(load, seconds, pace.end(), used, unseen)

    def _followers(self, stack: ExitStack) -> tuple[Listeners | None, Job | None]:
        if not self.load.followers:
            return None, None
        job = running_job(self.here)
        headers = {**AUTH, "Accept": "text/event-stream"}
        wire = request("GET", f"{BASE}/job/follow/{job.id}", headers)
        clients = stack.enter_context(listening(self.here.port, wire, self.load.followers))
        clients.wait_for(b"event: state\n", 2)
        return clients, job

    def _warm(self) -> None:
        """The password is checked, and what only the first of its kind needs is loaded."""
        ask(self.here.port, 1, 3, lambda _: request("GET", f"{BASE}/profile", AUTH))
        if self.load.pages:
            self._page()

    def _beside(self, *works: Callable[[], None]) -> None:
        def kept(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                self._errors.append(error)

        threads = [threading.Thread(target=kept, args=[work], daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        if self._errors:
            raise self._errors[0]

    def _drained(self) -> None:
        wanted = {"tests.jobs.InlineNap": self.load.inline, "tests.jobs.Nap": self.load.process}
        published = self.here.tables[CATALOGUE].find({"_id": {"$in": [*wanted]}})
        rows = [self._document(entry) for entry in published for _ in range(wanted[entry["_id"]])]
        if rows:
            self.here.tables[QUEUE].insert_many(rows)

    def _document(self, entry: Document) -> Document:
        order = JobOrder(
            name=entry["_id"],
            args={"n": next(self._numbers), "seconds": self.load.length},
            username="bench",
            unique=False,
            options=entry["options"],
            signature=entry["signature"],
        )
        return jobs.new_document(order, ObjectId(), utcnow())

    def _paced(self) -> None:
        if not self.load.paced:
            return
        session, start = requests.Session(), time.monotonic()
        session.auth = ADMIN
        gap = self.load.seconds / self.load.paced
        for number in range(self.load.paced):
            time.sleep(max(start + number * gap - time.monotonic(), 0.0))
            args = {"n": next(self._numbers), "seconds": self.load.length}
            body = {"qual_name": "tests.jobs.InlineNap", "args": args, "follow": False}
            answer = session.post(f"http://127.0.0.1:{self.here.port}{BASE}/job", json=body, timeout=60)
            assert answer.status_code == 200, answer.text

    def _paged(self) -> None:
        for _ in range(self.load.pages):
            self._page()

    def _page(self) -> None:
        path = f"{BASE}/job/journal?per_page=20&sort=" + '[["_id",-1]]'.replace('"', "%22")
        ask(self.here.port, 1, 1, lambda _: request("GET", path, AUTH))

    def _lines(self, clients: Listeners | None, job: Job | None) -> None:
        if clients is None or job is None:
            return
        gap = self.load.seconds / self.load.lines
        for number in range(1, self.load.lines + 1):
            start = time.monotonic()
            line = Line((job.fence << 32) + number, time.time(), "INFO", f"line {number} {'x' * 80}")
            self.here.loop.run(self.here.logs.append(job, "here", [line]))
            clients.wait_for(b"event: log\n", 1)
            time.sleep(max(start + gap - time.monotonic(), 0.0))

    def _wait(self) -> None:
        """Until no job waits or runs. This look is cheap; a count of the journal would read all of it."""
        end = time.monotonic() + PATIENCE
        while self.load.jobs and self.here.tables[QUEUE].find_one({"namespace": "DEFAULT"}, {"_id": 1}):
            if time.monotonic() > end:
                raise TimeoutError("jobs are left in the queue")
            time.sleep(1.0)


def running_job(here: Stand) -> Job:
    """A job that runs and belongs to nobody's worker: it can be followed."""
    order = JobOrder(name="tests.jobs.Noop", args={"n": 0}, username="bench", unique=False, namespace="SSE")

    async def begin() -> Job:
        await here.queue.enqueue(order)
        (job,) = await here.queue.claims.claim(here.owner, namespaces=["SSE"])
        return await here.queue.start(job, pid=1)

    return here.loop.run(begin())


# ---------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """Seconds of processor time of each part for one of each term; `pace` is the median of the machine's."""

    pace: float
    costs: Mapping[str, Mapping[str, float]]

    def predicted(self, part: str, point: Point) -> float:
        """Seconds of processor time."""
        return predicted(self.costs[part], point.counts)

    def full(self) -> list[Document]:
        """Where one core is full: of the database by jobs, workers, pages; of an API process by followers."""
        db, api = self.costs["db"], self.costs["api"]
        rows = []
        for workers in (1, 2, 4, 8):
            idle = db["second"] + db["worker_second"] * workers
            heard = db["job_heard"] * workers
            together = db["inline_job"] + db["inline_call"] / SLOTS + heard
            alone = db["inline_job"] + db["inline_call"] + heard + db["post"]
            rows += [
                {"full": f"inline jobs/s drained, {workers} workers", "at": _rate(1 - idle, together)},
                {
                    "full": f"inline jobs/s enqueued one by one, {workers} workers",
                    "at": _rate(1 - idle, alone),
                },
                {
                    "full": f"process jobs/s drained, {workers} workers",
                    "at": _rate(1 - idle, db["process_job"] + heard),
                },
            ]
        rows.append(
            {"full": "enqueues/s over HTTP, nobody runs them", "at": _rate(1 - db["second"], db["post"])}
        )
        rows.append({"full": "idle workers", "at": _rate(1 - db["second"], db["worker_second"])})
        for followers in (100, 1_000, 10_000):
            cost = api["line"] + api["frame"] * followers
            rows.append({"full": f"lines/s to {followers:,} followers", "at": _rate(1 - api["second"], cost)})
        for entries in (200, SPANNED):
            cost = db["page"] + db["entry_read"] * entries
            rows.append({"full": f"pages/s of {entries:,} entries", "at": _rate(1 - db["second"], cost)})
        left, cost = 1 - db["second"] - COUNT_SHARE, db["page"] + db["page_in_spans"]
        rows.append({"full": f"pages/s of more than {SPANNED:,} entries", "at": _rate(left, cost)})
        return rows


def _rate(left: float, cost: float) -> float | None:
    """How many a second use up what is left of a core; None if they cost nothing that was measured."""
    return max(left, 0.0) / cost if cost > 0 else None


def model_of(points: Sequence[Point]) -> Model:
    """Fit each part to the points that are to be fitted."""
    pace = statistics.median(point.pace for point in points)
    seen = [point for point in points if not point.unseen]
    costs = {}
    for part in PARTS:
        # A part that is not there has nothing to be measured.
        there = [point for point in seen if part != "worker" or point.load.workers]
        measured = [(point.counts, point.used[part]) for point in there]
        costs[part] = fitted(measured, TERMS[part], LEAST)
    return Model(pace, costs)


def rows(model: Model, points: Sequence[Point]) -> list[Document]:
    """Each load and part: measured and predicted seconds of processor time, medians of its repetitions."""
    found = []
    for load in dict.fromkeys(point.load for point in points):
        some = [point for point in points if point.load == load]
        for part in PARTS:
            if part == "worker" and not load.workers:
                continue
            measured = statistics.median(point.used[part] for point in some)
            expected = statistics.median(model.predicted(part, point) for point in some)
            row = {"load": load.name, "part": part, "measured": measured, "predicted": expected}
            found.append({**row, "error": expected / measured - 1, "unseen": some[0].unseen, "n": len(some)})
    return found


# ---------------------------------------------------------------------- the run


def measure(loads: Sequence[Load], repetitions: int, keep: Callable[[Point], None]) -> str:
    """These loads, and again; the kind of the server. Those with as many workers have one stand."""
    kind = ""
    for number in range(repetitions):
        for workers in sorted({load.workers for load in loads}):
            with stand(workers) as here:
                kind = here.kind
                warm = Load("warm", workers, 0, inline=WARM * workers, process=WARM * workers)
                numbers = count(1)
                Driver(here, warm, numbers).point(unseen=False)
                for load in (each for each in loads if each.workers == workers):
                    point = Driver(here, load, numbers).point(unseen=load in UNSEEN)
                    keep(point)
                    print(f"{number + 1}: {told(point)}", flush=True)
    return kind


def told(point: Point) -> str:
    """What was measured at a point, in a line."""
    used = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in point.used.items())
    return f"{point.load.name}: {used}, within {point.seconds:.0f} s; loop {point.pace * 1000:.2f} ms"


def table(model: Model, found: Sequence[Document]) -> str:
    """The costs, the points and where it is full, as text."""
    lines = [f"costs in ms of processor time, on a machine whose loop takes {model.pace * 1000:.2f} ms"]
    for part in PARTS:
        for term, cost in model.costs[part].items():
            lines.append(f"  {part:8}{term:16}{cost * 1000:>10.4f}   {MEANING[term]}")
    lines.append(f"\n{'':44}{'part':8}{'measured':>10}{'predicted':>10}{'error':>8}")
    for row in found:
        mark = "  not fitted" if row["unseen"] else ""
        lines.append(
            f"{row['load']:44}{row['part']:8}{row['measured']:>9.2f}s{row['predicted']:>9.2f}s"
            f"{row['error'] * 100:>+7.0f}%{mark}"
        )
    lines.append("\none core is full at")
    for row in model.full():
        lines.append(f"  {row['full']:50}" + ("-" if row["at"] is None else f"{row['at']:>12,.2f}"))
    return "\n".join(lines)


def read(path: Path) -> list[Point]:
    """The points of an earlier run."""
    kept = json.loads(path.read_text())["points"]
    return [Point(**{**each, "load": Load(**each["load"])}) for each in kept]


def main() -> None:
    """Measure, fit, predict; print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.model", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2, help="of all points (default: 2)")
    parser.add_argument("--unseen", action="store_true", help="only loads that are not fitted")
    parser.add_argument("--workers", type=int, action="append", help="only loads with so many; repeatable")
    parser.add_argument(
        "--points", type=Path, action="append", default=[], help="file of an earlier run, too"
    )
    parser.add_argument("--fit", action="store_true", help="measure nothing, only fit what --points names")
    parser.add_argument("--json", type=Path, help="file for the numbers, written after each point")
    options = parser.parse_args()
    points = [point for path in options.points for point in read(path)]
    offered: Sequence[Load] = UNSEEN if options.unseen else (*GRID, *UNSEEN)
    loads = [load for load in offered if not options.workers or load.workers in options.workers]
    facts: Document = {"python": platform.python_version(), "cores": os.cpu_count()}

    def keep(point: Point) -> None:
        points.append(point)
        write({"points": [asdict(each) for each in points]})

    def write(more: Document) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**facts, **more}, indent=1) + "\n")

    if not options.fit:
        facts["server"] = measure(loads, options.repetitions, keep)
    model = model_of(points)
    found = rows(model, points)
    print(
        f"\n{facts.get('server', 'points of earlier runs')}, {facts['cores']} cores, n = {len(points)} points"
    )
    print(table(model, found))
    kept = [asdict(each) for each in points]
    write({"pace": model.pace, "costs": model.costs, "rows": found, "full": model.full(), "points": kept})


if __name__ == "__main__":
    main()
