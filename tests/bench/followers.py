"""``python -m tests.bench.followers``: thousands of followers that hear nothing, and some that never read.

Each has an API process of its own. `idle`: what a follower costs in memory and connections to the database, a
GET beside them, one line to all of them, and the end of the process with all of them open. `stalled`: a job
writes megabytes that some followers never take: memory, when they are cut, what a reader beside them waits.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import statistics
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from core4.jobs import Job
from core4.logs import Line
from tests.bench.model import running_job
from tests.bench.sockets import Listeners, ask, listening, request
from tests.bench.stand import AUTH, Stand, stand
from tests.helpers import BASE, eventually, has_ended

Values = dict[str, Any]
GETS = 300  # per look at what a GET takes
FIRST = (
    50  # followers before anything is measured: what they make the process load is no memory of the others
)
CHUNK = 1_000  # lines of 500 characters that are stored at once
CUT = 60.0  # seconds after which who has not been cut is not going to be
SMALL = 4096  # bytes that a socket which nobody reads takes


class Crowd:
    """A followed job on a stand, and the API process that everybody follows it at."""

    def __init__(self, here: Stand) -> None:
        self.here = here
        self.job: Job = running_job(here)
        self._seq = self.job.fence << 32
        headers = {**AUTH, "Accept": "text/event-stream"}
        self.wire = request("GET", f"{BASE}/job/follow/{self.job.id}", headers)
        with listening(here.port, self.wire, FIRST) as some:
            some.wait_for(b"event: state\n", 2)
        self.gets()

    @property
    def api(self) -> psutil.Process:
        return psutil.Process(self.here.pids["api"][0])

    def write(self, lines: int, text: str) -> None:
        """Store lines of the job as one chunk."""
        some = [Line(self._seq + n, time.time(), "INFO", text) for n in range(1, lines + 1)]
        self._seq += lines
        self.here.loop.run(self.here.logs.append(self.job, "here", some))

    def gets(self) -> Values:
        """Milliseconds of a GET of the job, one after the other."""
        wire = request("GET", f"{BASE}/job/{self.job.id}", AUTH)
        _, took = ask(self.here.port, 1, GETS, lambda _: wire)
        cuts = statistics.quantiles(took, n=100)
        return {"get_p50_ms": cuts[49] * 1000, "get_p99_ms": cuts[98] * 1000}

    def connections(self) -> tuple[int, int]:
        """Those of the API process to the database, and those of clients to it."""
        own = self.here.port
        found = [each for each in self.api.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        clients = sum(each.laddr.port == own for each in found)
        return len(found) - clients, clients

    def ended(self) -> float:
        """Seconds from SIGTERM to the end of the API process."""
        pid, start = self.api.pid, time.perf_counter()
        self.api.send_signal(signal.SIGTERM)
        eventually(lambda: has_ended(pid), 120, what="the end of the API", every=0.01)
        return time.perf_counter() - start


def idle(here: Stand, followers: int) -> Values:
    """Followers of a job that says nothing."""
    crowd = Crowd(here)
    values: Values = {f"alone_{name}": value for name, value in crowd.gets().items()}
    values["alone_connections"] = crowd.connections()[0]
    before = here.memory("api")
    with listening(here.port, crowd.wire, followers) as clients:
        values["connect_s"] = clients.connect_seconds
        clients.wait_for(b"event: state\n", 2)
        values["burst_connections"] = crowd.connections()[0]
        clients.drain(0.5)
        values["kb_each"] = (here.memory("api") - before) / followers / 1024
        values |= crowd.gets()
        values["get_p99_ratio"] = values["get_p99_ms"] / values["alone_get_p99_ms"]
        values["connections"] = crowd.connections()[0]
        values["one_line_ms"] = statistics.median(_line(crowd, clients) for _ in range(5)) * 1000
        values["shutdown_s"] = crowd.ended()
    return values


def _line(crowd: Crowd, clients: Listeners) -> float:
    start = time.perf_counter()
    crowd.write(1, "x" * 100)
    clients.wait_for(b"event: log\n", 1)
    return time.perf_counter() - start


def stalled(here: Stand, followers: int, megabytes: int) -> Values:
    """Followers that never read, while their job writes; one beside them reads."""
    crowd = Crowd(here)
    with ExitStack() as stack:
        for _ in range(followers):
            stack.enter_context(_deaf(here.port, crowd.wire))
        reader = stack.enter_context(listening(here.port, crowd.wire, 1))
        reader.wait_for(b"event: state\n", 2)
        before = here.memory("api")
        most, delays = before, []
        for _ in range(megabytes * 1_000_000 // (CHUNK * 500)):
            start = time.perf_counter()
            crowd.write(CHUNK, "x" * 500)
            reader.wait_for(b"event: log\n", CHUNK)
            delays.append(time.perf_counter() - start)
            most = max(most, here.memory("api"))
        written = time.perf_counter()
        with suppress(AssertionError):  # who is left is counted
            eventually(lambda: crowd.connections()[1] <= 1, CUT, every=0.5)
        cut_after, left = time.perf_counter() - written, crowd.connections()[1] - 1
        most = max(most, here.memory("api"))
        return {
            "growth_mb": (most - before) / 2**20,
            "not_cut": left,
            "cut_after_s": cut_after,
            "chunk_p50_s": statistics.median(delays),
            "chunk_p99_s": statistics.quantiles(delays, n=100)[98],
            "chunk_max_s": max(delays),
            "connections": crowd.connections()[0],
            "shutdown_s": crowd.ended(),
        }


def _deaf(port: int, wire: bytes) -> socket.socket:
    """A follower that asks and then reads nothing."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    found.connect(("127.0.0.1", port))
    found.sendall(wire)
    return found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.followers", description=__doc__)
    parser.add_argument("probes", nargs="*", help="idle, stalled (default: both)")
    parser.add_argument("--followers", type=int, default=5_000, help="that hear nothing (default: 5000)")
    parser.add_argument("--stalled", type=int, default=200, help="that never read (default: 200)")
    parser.add_argument("--megabytes", type=int, default=50, help="that the job writes (default: 50)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found: dict[str, Values] = {}
    for name in options.probes or ("idle", "stalled"):
        with stand(0) as here:
            if name == "idle":
                found[name] = idle(here, options.followers)
            else:
                found[name] = stalled(here, options.stalled, options.megabytes)
            print(
                f"{name}, {here.kind}: {options.followers if name == 'idle' else options.stalled} followers"
            )
        for key, value in found[name].items():
            print(f"  {key:24}{value:>12.2f}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
