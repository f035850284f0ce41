"""The peers as figures: their environment, their workers, how long their jobs take.

Their services are named by `SERVICES`; one that is not there is left out, with the reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers.mark import MARKS, marks
from tests.bench.probes import Figure, middle
from tests.helpers import ROOT, Command, clean_environ

SERVICES = {
    "CORE4_BENCH_REDIS": "redis://127.0.0.1:6379/0",
    "CORE4_BENCH_AMQP": "amqp://guest:guest@127.0.0.1:5672//",
    "CORE4_BENCH_POSTGRES": "postgresql://core4_bench:core4_bench@127.0.0.1:5432/core4_bench",
}
REQUIREMENTS = ROOT / "tests/bench/peers/requirements.txt"
ENVIRONMENT = Path(sys.prefix) / "peers"
PATIENCE = 300.0  # seconds for one drain, and for whatever a client does
START_TIMEOUT = 30.0  # seconds until a worker runs its first job
SETTLE = 0.3  # seconds after the last job in which a job that was run twice would show


def environment() -> Path:
    """The peers' own interpreter, made anew when the requirements have changed."""
    stamp = ENVIRONMENT / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        print("installing the peers in an environment of their own (a minute, the first time)", flush=True)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = [str(ENVIRONMENT / "bin/python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
        shutil.copy(REQUIREMENTS, stamp)
    return ENVIRONMENT / "bin/python"


def versions() -> list[str]:
    """What is measured, as pip names it."""
    return [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]


@dataclass(frozen=True)
class Kind:
    """What there is to know of one peer; `{...}` in the worker's command is filled in."""

    title: str
    module: str
    worker: str
    times: float  # as many jobs in a drain as the product has inline


KINDS = {
    "rq": Kind("RQ, fork per job", "rq_peer", "-m rq.cli worker --quiet --url {redis} {queue}", 0.25),
    "celery": Kind(
        "Celery, RabbitMQ",
        "celery_peer",
        "-m celery --app tests.bench.peers.celery_peer worker --concurrency 1 --loglevel error",
        2.0,
    ),
    "procrastinate": Kind(
        "Procrastinate, PostgreSQL",
        "procrastinate_peer",
        "-m procrastinate --app tests.bench.peers.procrastinate_peer.app worker"
        " --queues {queue} --concurrency {slots}",
        1.0,
    ),
}


class Rival:
    """One peer: a queue of its own, and a worker while it is measured."""

    def __init__(self, kind: Kind, python: Path, slots: int, drained: int, home: Path) -> None:
        self.kind, self.python, self.jobs = kind, python, int(drained * kind.times)
        self.queue = f"core4_bench_{uuid.uuid4().hex[:8]}"
        self.file = home / f"{self.queue}.marks"
        self.latencies = max(drained // 16, 5)
        services = {name: os.environ.get(name, url) for name, url in SERVICES.items()}
        own = {MARKS: str(self.file), "BENCH_QUEUE": self.queue, "PYTHONPATH": str(ROOT)}
        self.environ: Mapping[str, str] = {**services, **own}
        words = {"redis": services["CORE4_BENCH_REDIS"], "queue": self.queue, "slots": slots}
        self.command = [str(python), *(word.format(**words) for word in kind.worker.split())]
        self.drained = Figure(f"{kind.title}: drained", self.drain)
        self.idle = Figure(f"{kind.title}: idle", self.latency)

    def ask(self, what: str, number: int = 0) -> str:
        """Have its client do something; what it printed.

        Raises: RuntimeError with the end of what went wrong.
        """
        done = subprocess.run(
            [self.python, "-m", "tests.bench.peers.client", self.kind.module, what, str(number)],
            env={**clean_environ(), **self.environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{self.kind.title}: {what}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def worker(self) -> Command:
        return Command(self.command, self.environ, cwd=ROOT)

    async def drain(self) -> Sequence[float]:
        """Seconds per job, of the 20 to 95 % part of a full queue that a worker finds when it starts."""
        self.file.unlink(missing_ok=True)
        await asyncio.to_thread(self.ask, "fill", self.jobs)
        with self.worker():
            ended = await self.marked(self.jobs, PATIENCE)
        return [middle(ended)]

    async def latency(self) -> Sequence[float]:
        """From the call to the first line of the body, its worker being idle."""
        self.file.unlink(missing_ok=True)
        await asyncio.to_thread(self.ask, "fill", 1)
        with self.worker():
            await self.marked(1, START_TIMEOUT)
            found = json.loads(await asyncio.to_thread(self.ask, "latency", self.latencies))
        return [float(each) for each in found]

    async def marked(self, number: int, patience: float) -> list[float]:
        """When each of so many jobs began, as soon as all have; none may run twice."""
        deadline = time.monotonic() + patience
        while len(found := marks(self.file)) < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.kind.title}: {len(found)} of {number} jobs have left their mark")
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE)
        found = marks(self.file)
        assert len(found) == number, f"{self.kind.title}: {len(found)} marks of {number} jobs"
        return found


def rivals(stack: ExitStack, slots: int, drained: int) -> tuple[dict[str, Rival], dict[str, str]]:
    """Those whose service is there, and why others are not; within `stack`."""
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
    python = environment()
    found: dict[str, Rival] = {}
    skipped: dict[str, str] = {}
    for name, kind in KINDS.items():
        rival = Rival(kind, python, slots, drained, home)
        try:
            rival.ask("open")
        except RuntimeError as error:
            skipped[name] = str(error).splitlines()[-1]
            print(f"without {kind.title}: {skipped[name]}", flush=True)
        else:
            stack.callback(rival.ask, "clear")
            found[name] = rival
    return found, skipped
