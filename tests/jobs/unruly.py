"""Jobs that end in every way a process can end, and some that try not to."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from core4 import CoreJob

os.environ["SEEN_AT_IMPORT"] = "yes"


def write_pid(path: str) -> None:
    """Tell the test who runs; the file appears at once with all that is in it."""
    if path in ("", os.devnull):
        return  # nobody asks; a rename would put a file in the place of the device
    Path(path + ".part").write_text(str(os.getpid()))
    os.rename(path + ".part", path)


def linger(pidfile: str) -> None:
    write_pid(pidfile)
    while True:
        time.sleep(60)


class Inside:
    """An object that a job makes; it knows nothing of the job."""

    def speak(self) -> None:
        logging.getLogger("inside").info("from inside")


def nested(levels: int) -> list[Any]:
    """A list in a list, so many times."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


class Unruly(CoreJob):
    """Does `what`."""

    author = "tests"
    qual_name = "tests.jobs.Unruly"
    progress_interval = 0.01

    def execute(self, what: str, pidfile: str = "", value: Any = None) -> Any:
        return getattr(self, what)(pidfile, value)

    def answer(self, pidfile: str, value: Any) -> Any:
        return value

    def about(self, pidfile: str, value: Any) -> dict[str, Any]:
        """What a job process has and has not."""
        return {
            "modules": [
                name for name in ("asyncio", "pymongo", "bson", "motor", "jsonschema") if name in sys.modules
            ],
            "environ": dict(os.environ),
            "files": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
            "session": os.getsid(0) == os.getpid(),
            "job": [self.job_id, self.attempt, self.name, dict(self.args)["what"]],
            "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "stdin": os.read(0, 1).decode(),
            "cwd": os.getcwd(),
            "threads": threading.active_count(),
        }

    def random(self, pidfile: str, value: Any) -> float:
        import random

        return random.random()

    def sleep(self, pidfile: str, value: Any) -> None:
        write_pid(pidfile)
        time.sleep(value)

    def ignore_term(self, pidfile: str, value: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        linger(pidfile)

    def spin(self, pidfile: str, value: Any) -> None:
        write_pid(pidfile)
        while True:
            pass

    def report_term(self, pidfile: str, value: Any) -> None:
        """Goes on after TERM; the file shows that it was sent."""
        signal.signal(signal.SIGTERM, lambda number, frame: write_pid(pidfile))
        while True:
            time.sleep(60)

    def eat(self, pidfile: str, value: Any) -> None:
        """So many bytes, in memory and not only asked for."""
        write_pid(pidfile)
        food = bytearray(b"x") * value
        time.sleep(600)
        del food

    def share_a_meal(self, pidfile: str, value: Any) -> None:
        """Two detached children eat; none of the three has too much."""
        write_pid(pidfile)
        for _ in range(2):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    self.eat("", value)
                os._exit(0)
        time.sleep(600)

    def handle_term(self, pidfile: str, value: Any) -> str:
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        write_pid(pidfile)
        ended.wait()
        return "tidied up"

    def double_fork(self, pidfile: str, value: Any) -> None:
        """A daemon as of old: new session, parent gone."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                linger(pidfile)
            os._exit(0)
        os.wait()
        while not os.path.exists(pidfile):
            time.sleep(0.01)
        if value == "stay":
            time.sleep(600)

    def subprocess_tree(self, pidfile: str, value: Any) -> None:
        code = f"import os, time; open({pidfile!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        time.sleep(600)

    def segfault(self, pidfile: str, value: Any) -> None:
        ctypes.string_at(0)

    def exit_hard(self, pidfile: str, value: Any) -> None:
        os._exit(7)

    def exit_softly(self, pidfile: str, value: Any) -> None:
        sys.exit("that is it")

    def kill_itself(self, pidfile: str, value: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_its_keeper(self, pidfile: str, value: Any) -> None:
        if os.fork() == 0:
            os.setsid()
            linger(pidfile)
        while not os.path.exists(pidfile):
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    def stop_its_keeper(self, pidfile: str, value: Any) -> None:
        os.kill(os.getppid(), signal.SIGSTOP)
        write_pid(pidfile)

    def stop_its_keeper_and_die(self, pidfile: str, value: Any) -> None:
        os.kill(os.getppid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)

    def close_streams(self, pidfile: str, value: Any) -> str:
        print("before")
        sys.stdout.close()
        os.close(2)
        return "still here"

    def close_everything(self, pidfile: str, value: Any) -> str:
        os.closerange(0, 100)
        return "unheard"

    def garbage(self, pidfile: str, value: Any) -> None:
        for fd in range(3, 10):
            try:
                os.write(fd, value.encode("latin-1"))
            except OSError:
                continue
        time.sleep(600)

    def frames(self, pidfile: str, value: Any) -> None:
        """What a hostile job may send by itself."""
        for message in value:
            body = json.dumps(message, separators=(",", ":")).encode()
            with open(3, "wb", closefd=False) as pipe:  # of a long one os.write sends a part
                pipe.write(len(body).to_bytes(4, "big") + body)

    def calls_nonsense(self, pidfile: str, value: Any) -> str:
        """Call what no name can be, and wait for the answer."""
        self.frames(pidfile, [{"number": 1, "call": {"name": "\ud800", "args": {}}}])
        size = int.from_bytes(os.read(3, 4), "big")
        answer: str = json.loads(os.read(3, size))["refused"]["reason"]
        return answer

    def traceback(self, pidfile: str, value: Any) -> None:
        failed = {"message": "m" * 200_000, "traceback": ["a"] * value}
        self.frames(pidfile, [{"failed": failed}])

    def output(self, pidfile: str, value: Any) -> None:
        sys.stdout.flush()
        os.write(1, b"caf\xc3\xa9 \xff\xfe \x00 end\n")
        print("printed \udcff")
        subprocess.run(
            ["/bin/sh", "-c", "echo from a child; echo to stderr >&2; echo anew > /dev/stdout"], check=True
        )
        libc = ctypes.CDLL(None)
        libc.puts(b"from the C library")
        libc.fflush(None)
        os.write(2, b"unterminated")

    def long_line(self, pidfile: str, value: Any) -> None:
        os.write(1, b"x" * 10)
        for _ in range(160):
            os.write(1, b"y" * 65536)
        print("\nafter")

    def many_lines(self, pidfile: str, value: Any) -> None:
        for number in range(value):
            print(number)
            self.logger.info("line %d", number)

    def empty_lines(self, pidfile: str, value: Any) -> None:
        for _ in range(value):
            os.write(1, b"\n" * 65536)

    def logs(self, pidfile: str, value: Any) -> None:
        self.logger.debug("own debug")
        logging.getLogger(__name__).debug("module debug")
        logging.getLogger("library").debug("library debug")
        logging.getLogger("library").warning("library warning")
        warnings.warn("a warning", stacklevel=1)
        try:
            raise ValueError("inner")
        except ValueError:
            self.logger.exception("caught %s", "it")
        self.logger.log(35, "own level")
        self.logger.info("bad %d", "format")

    def worst_case(self, pidfile: str, value: Any) -> None:
        """A library chatters, and something goes badly wrong twice; what is told of the chatter?"""
        library = logging.getLogger("library")
        for number in range(value):
            library.debug("chatter %d", number)
        Inside().speak()
        self.logger.critical("first")
        library.debug("between")
        self.logger.critical("second")
        library.debug("last words")
        raise RuntimeError("as told")

    def forks(self, pidfile: str, value: Any) -> str:
        """Children that log, raise and come back out of execute."""
        process = multiprocessing.get_context("fork").Process(
            target=self.logger.warning, args=("in a child",)
        )
        process.start()
        process.join()
        child = os.fork()
        if child == 0:
            return "from the child"
        os.waitpid(child, 0)
        return "from the parent"

    def reports(self, pidfile: str, value: Any) -> None:
        for step in range(5):
            self.progress(step / 5, "step %d", step, force=True)

    def reports_and_waits(self, pidfile: str, value: Any) -> None:
        write_pid(pidfile)
        while True:
            self.progress(0.5, "still here", force=True)
            time.sleep(0.1)

    def reports_until_told(self, pidfile: str, value: Any) -> None:
        """Reports for longer than its zombie_time, says so, and is silent when it is told to be."""
        end = time.monotonic() + 1.5 * self.zombie_time
        while not os.path.exists(pidfile + ".enough"):
            self.progress(0.5, force=True)
            if time.monotonic() > end and not os.path.exists(pidfile):
                write_pid(pidfile)
            time.sleep(0.05)
        time.sleep(600)

    def defers(self, pidfile: str, value: Any) -> None:
        self.defer("not %s", "yet")

    def raises(self, pidfile: str, value: Any) -> None:
        raise RuntimeError("as told")

    def fork_bomb(self, pidfile: str, value: Any) -> None:
        """Every process makes more, as fast as it can; it is bounded by as many tokens as `value`."""
        tokens, bank = os.pipe2(os.O_NONBLOCK)
        os.write(bank, b"." * value)
        while True:
            try:
                os.read(tokens, 1)
            except BlockingIOError:
                time.sleep(60)
                continue
            if os.fork() == 0:
                os.setsid()

    def flood(self, pidfile: str, value: Any) -> None:
        """So many MiB of lines."""
        lines = (b"x" * 127 + b"\n") * 8192
        for _ in range(value):
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(1, rest) :]

    def odd_result(self, pidfile: str, value: Any) -> Any:
        cycle: list[Any] = []
        cycle.append(cycle)
        odd = {"nan": float("nan"), "bytes": b"x", "cycle": cycle, "lambda": lambda: 0, "deep": nested(1000)}
        return odd[value] if value in odd else "x" * value

    def deep_child(self, pidfile: str, value: Any) -> str:
        return self.enqueue(self.name, what="answer", value=nested(1000))

    def missing_import(self, pidfile: str, value: Any) -> None:
        import no_such_module_anywhere  # type: ignore[import-not-found]  # noqa: F401

    def stray_thread(self, pidfile: str, value: Any) -> str:
        threading.Thread(target=linger, args=(pidfile,)).start()
        return "done, but for a thread"
