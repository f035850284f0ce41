"""Coroutine functions as jobs: the same body on a loop of its own, and on one that is shared."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core4 import CoreJob
from core4.context import current

NOISY = logging.getLogger("noisy")  # a library with a handler of its own
NOISY.addHandler(logging.StreamHandler())
NOISY.propagate = False


def write_pid(path: str) -> None:
    """Tell the test who runs; the file appears at once with all that is in it."""
    Path(path + ".part").write_text(str(os.getpid()))
    os.rename(path + ".part", path)


class Awaiting(CoreJob):
    """Does `what` on a loop of its own."""

    author = "tests"
    qual_name = "tests.jobs.Awaiting"
    progress_interval = 0.01

    async def execute(self, what: str, pidfile: str = "", value: Any = None) -> Any:
        return await getattr(self, what)(pidfile, value)

    async def answer(self, pidfile: str, value: Any) -> Any:
        self.logger.info("before")
        await asyncio.sleep(0)
        return value

    async def raises(self, pidfile: str, value: Any) -> None:
        logging.getLogger("library").debug("held back")
        raise RuntimeError("as told")

    async def enqueues(self, pidfile: str, value: Any) -> str:
        return await self.enqueue_async("tests.jobs.Awaiting", what="answer", value=value)

    async def leaves_a_task(self, pidfile: str, value: Any) -> str:
        self.left = asyncio.create_task(asyncio.sleep(600))
        await asyncio.sleep(0)
        return "left"


class Shared(Awaiting):
    """Does `what` on a loop that it shares with others."""

    author = "tests"
    qual_name = "tests.jobs.Shared"
    inline = True
    max_parallel = None

    async def meets(self, pidfile: str, value: Any) -> dict[str, Any]:
        """Wait until `value` jobs are here at the same time: each puts a file into one folder."""
        folder = Path(pidfile)
        (folder / self.job_id).touch()
        while len(list(folder.iterdir())) < value:
            await asyncio.sleep(0.02)
        return {"pid": os.getpid()}

    async def waits(self, pidfile: str, value: Any) -> dict[str, Any]:
        """Until the test has written the file `value`."""
        write_pid(pidfile)
        while not os.path.exists(value):
            await asyncio.sleep(0.02)
        return {"pid": os.getpid(), "attempt": self.attempt}

    async def waits_in_the_end(self, pidfile: str, value: Any) -> dict[str, Any]:
        """The same, but for the first attempt, which fails."""
        if self.attempt == 1:
            raise RuntimeError("the first")
        return await self.waits(pidfile, value)

    async def where(self, pidfile: str, value: Any) -> dict[str, Any]:
        """What a host has and has not."""
        return {
            "pid": os.getpid(),
            "modules": [name for name in ("pymongo", "bson", "motor") if name in sys.modules],
            "environ": sorted(name for name in os.environ if name.startswith("CORE4_")),
        }

    async def talks(self, pidfile: str, value: Any) -> None:
        """Ten lines of each kind, in turns with whoever else talks; then from a task and from a thread."""
        me = value
        for n in range(10):
            print(f"{me} print {n}")
            print(f"{me} error {n}", file=sys.stderr)
            NOISY.warning("%s noise %d", me, n)
            self.logger.debug("%s log %d", me, n)
            logging.getLogger("library").warning("%s library %d", me, n)
            self.progress(n / 10, "%s at %d", me, n, force=True)
            await asyncio.sleep(0.01)
        await asyncio.create_task(self._tell(me))
        await asyncio.to_thread(self._tell_from_thread, me)
        sys.stdout.buffer.write(f"{me} bytes\n".encode())
        print(f"{me} unterminated", end="")

    async def _tell(self, me: str) -> None:
        job = current()
        assert job is not None
        print(f"{me} task {job.job_id == self.job_id}")

    def _tell_from_thread(self, me: str) -> None:
        job = current()
        assert job is not None
        print(f"{me} thread {job.job_id == self.job_id}")
        self.logger.info("%s thread", me)

    async def prints(self, pidfile: str, value: Any) -> None:
        for number in range(value):
            print(number)
            if number % 100 == 0:
                await asyncio.sleep(0)

    async def floods(self, pidfile: str, value: Any) -> None:
        """Without an await in between."""
        for _ in range(value):
            print("x" * 1000)

    async def spins(self, pidfile: str, value: Any) -> None:
        write_pid(pidfile)
        while True:
            pass

    async def holds_the_lock(self, pidfile: str, value: Any) -> None:
        """A call into C that does not give Python's lock back for years."""
        write_pid(pidfile)
        re.match(r"(a+)+$", "a" * 60 + "b")

    async def spins_in_a_callback(self, pidfile: str, value: Any) -> None:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 600)
        write_pid(pidfile)
        await asyncio.sleep(600)

    async def refuses(self, pidfile: str, value: Any) -> None:
        """Takes no cancel for an answer."""
        write_pid(pidfile)
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                continue

    async def tidies_up(self, pidfile: str, value: Any) -> str:
        write_pid(pidfile)
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            return "tidied up"
        return "slept"

    async def leaves_a_stubborn_task(self, pidfile: str, value: Any) -> str:
        self.left = asyncio.create_task(self.refuses(pidfile, None))
        await asyncio.sleep(0.05)
        return "left"

    async def segfaults(self, pidfile: str, value: Any) -> None:
        await asyncio.sleep(0.05)
        ctypes.string_at(0)

    async def exits_hard(self, pidfile: str, value: Any) -> None:
        await asyncio.sleep(0.05)
        os._exit(7)

    async def exits_softly(self, pidfile: str, value: Any) -> None:
        sys.exit("that is it")

    async def exits_in_a_task(self, pidfile: str, value: Any) -> str:
        task = asyncio.create_task(self.exits_softly("", None))
        await asyncio.wait({task})
        return repr(task.exception())

    async def crashes_in_a_thread(self, pidfile: str, value: Any) -> None:
        """While the loop is idle: nobody can see whose thread it is. Alone in a process it is known."""
        await asyncio.to_thread(self._crash_later)

    def _crash_later(self) -> None:
        time.sleep(0.3)
        os._exit(9)

    async def forks(self, pidfile: str, value: Any) -> str:
        """A child that logs, prints, and comes back to the loop."""
        child = os.fork()
        if child == 0:
            print("from the child")
            self.logger.info("from the child")
            self.progress(0.9, "from the child", force=True)
            await asyncio.sleep(0)
            return "from the child"
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            await asyncio.sleep(0.02)
        return "from the parent"

    async def multiplies(self, pidfile: str, value: Any) -> None:
        """So many processes."""
        for _ in range(value):
            subprocess.Popen(["/bin/sleep", "600"])
        await asyncio.sleep(600)

    async def prints_below(self, pidfile: str, value: Any) -> None:
        """Past Python: nobody knows whose it is."""
        process = await asyncio.create_subprocess_exec("/bin/echo", "from below")
        await process.wait()
        subprocess.run(["/bin/true"], check=True)

    async def sends(self, pidfile: str, value: Any) -> None:
        """Frames of its own making on every socket there is."""
        for fd in range(3, 64):
            try:
                os.write(fd, value.encode("latin-1"))
            except OSError:
                continue
        await asyncio.sleep(600)

    async def ends_twice(self, pidfile: str, value: Any) -> str:
        report: Any = self._context.report
        send = report.__closure__[0].cell_contents
        send({"complete": {"result": "forged"}})
        send({"complete": {"result": "again"}})
        return "own"

    async def enqueues_on_the_loop(self, pidfile: str, value: Any) -> str:
        return self.enqueue("tests.jobs.Shared", what="answer")

    async def defers(self, pidfile: str, value: Any) -> None:
        self.defer("not %s", "yet")
