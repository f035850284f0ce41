"""Workers in windows of tmux: they outlive whoever started them, and people can look at each.

One tmux server per data folder, with a socket and a session of its own. Its first window is the supervisor
(`core4 tmux supervise`), which keeps the others up; should it die itself, its shell starts it again, and it
finds the windows that there are. What it is to do is an option of the server, so that nobody needs its pid:
the number of workers, or that they are to end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import SIGCHLD

import psutil

from core4.config import PREFIX, Settings, without_settings
from core4.embedded import database_url, write_private
from core4.errors import ConfigError, Core4Error
from core4.pool import MARGIN, Pool, Size, how, supervise

SESSION, SUPERVISOR = "core4", "supervisor"
SETTINGS_FILE = "tmux.toml"
WANTED = "@core4_workers"  # option of the server: the number of workers, or one of the next two
STOP, NOW = "stop", "now"
LOOK = 0.1  # seconds between two looks at a server that ends
_LAUNCH = re.compile(rf"{PREFIX}WORKER_LAUNCH=([A-Za-z0-9._-]+)")
_PANE = ("window_id", "pane_pid", "pane_dead", "pane_dead_status", "pane_dead_signal", "pane_start_command")
_FORMAT = "\t".join(f"#{{{name}}}" for name in ("window_name", *_PANE))


class TmuxFailed(Core4Error):
    """tmux refused what it was asked for."""

    code = "tmux_failed"


class Window:
    """One window with a worker, as a line of `tmux list-windows` shows it."""

    def __init__(self, line: str) -> None:
        self.name, self.id, pid, dead, status, signal, command = line.split("\t", 6)
        self.pid, self.dead = int(pid), dead == "1"
        found = _LAUNCH.search(command)
        self.launch = found[1] if found else ""
        self._status, self._signal = status, signal

    @property
    def ended(self) -> bool:
        """True if its worker has ended; tmux shows the end of its output a moment before it knows how."""
        return self.dead and (bool(self._status or self._signal) or not psutil.pid_exists(self.pid))

    @property
    def how(self) -> str:
        """How its worker has ended, if not as it should."""
        if self._signal:
            return how(-int(self._signal))
        return how(int(self._status)) if self._status else "nobody knows how"


class Windows:
    """The windows of one data folder, as a `core4.pool.Place`."""

    def __init__(self, home: Path) -> None:
        self._file = home / SETTINGS_FILE
        self.socket = "core4-" + hashlib.sha256(str(home).encode()).hexdigest()[:12]
        self._known: set[str] = set()

    # ------------------------------------------------------------------ for people

    def open(self, settings: Settings, count: int) -> bool:
        """Have `count` workers with these settings; False if there are windows, and only their number is new.

        Raises: ConfigError without tmux; TmuxFailed.
        """
        self._require()
        if self.is_open():
            self._tmux("set-option", "-s", WANTED, str(count))
            return False
        # In a file for this user, as tmux shows its environment and its commands to whoever asks.
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._file, _toml(replace(settings, slots=settings.slots or 1)))
        again = f"until {self._core4('tmux', 'supervise')}; do sleep 1; done"
        self._tmux(
            *("new-session", "-d", "-s", SESSION, "-n", SUPERVISOR, "-x", "200", "-y", "50", again, ";"),
            *("set-option", "-g", "remain-on-exit", "on", ";"),
            *("set-option", "-s", WANTED, str(count)),
        )
        return True

    def close(self, patience: float, *, now: bool = False) -> bool:
        """End all workers; False if there is none. Their jobs get `patience` seconds, or none (`now`).

        Raises: ConfigError without tmux.
        """
        self._require()
        if not self.is_open():
            return False
        self._tmux("set-option", "-s", WANTED, NOW if now else STOP)
        deadline = time.monotonic() + patience + 2 * MARGIN
        while self.is_open() and time.monotonic() < deadline:
            time.sleep(LOOK)
        self.kill()
        return True

    def kill(self) -> None:
        """End the server with all that is in it, at once; harmless if there is none."""
        self._run("kill-server")
        self._file.unlink(missing_ok=True)

    def attach(self, window: str) -> list[str]:
        """The command that shows a window in this terminal.

        Raises: ConfigError without tmux, or without that window.
        """
        self._require()
        if window not in [SUPERVISOR, *(each.name for each in self.all())]:
            raise ConfigError(f"no window {window}; `core4 tmux list` shows which there are")
        return [*self._command, "attach-session", "-t", f"{SESSION}:{window}"]

    def is_open(self) -> bool:
        """True if the server runs."""
        return self._run("has-session", "-t", SESSION).returncode == 0

    def all(self) -> list[Window]:
        """The windows with a worker; those of workers that have just ended, too."""
        done = self._run("list-windows", "-t", SESSION, "-F", _FORMAT)
        windows = [Window(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []
        for window in windows:
            if window.dead and not window.ended:
                _remind(window.pid)
        return [window for window in windows if window.launch]

    @property
    def wanted(self) -> str:
        """What the supervisor is to do; empty if it was not told yet."""
        return self._run("show-options", "-sqv", WANTED).stdout.strip()

    @wanted.setter
    def wanted(self, value: str) -> None:
        self._tmux("set-option", "-s", WANTED, value)

    # ------------------------------------------------------------------ for the pool

    def launches(self) -> list[str]:
        return [window.launch for window in self.all() if not window.dead]

    def start(self, launch: str) -> None:
        # The name of a worker that has ended is free, though its window may not be closed yet.
        taken = {window.name for window in self.all() if not window.dead}
        nr = next(nr for nr in range(1, len(taken) + 2) if f"w{nr}" not in taken)
        own = {"WORKER_TYPE": "tmux", "WORKER_NR": str(nr), "WORKER_LAUNCH": launch}
        words = ["env", *(f"{PREFIX}{name}={value}" for name, value in own.items())]
        command = f"exec {shlex.join(words)} {self._core4('worker')}"
        self._tmux("new-window", "-d", "-t", f"{SESSION}:", "-n", f"w{nr}", command)
        self._known.add(launch)

    def ended(self) -> dict[str, str]:
        windows = self.all()
        gone = {window.launch: window.how for window in windows if window.ended}
        for window in windows:
            if window.ended:
                self._run("kill-window", "-t", window.id)
        there = {window.launch for window in windows}
        gone |= dict.fromkeys(self._known - there, "its window was closed")
        self._known = there - set(gone)
        return gone

    def signal(self, launch: str, number: int) -> None:
        for window in self.all():
            if window.launch == launch and not window.dead:
                os.kill(window.pid, number)

    # ------------------------------------------------------------------ inside

    def _core4(self, *words: str) -> str:
        return shlex.join([sys.executable, "-P", "-m", "core4", "--config", str(self._file), *words])

    @property
    def _command(self) -> Sequence[str]:
        return ("tmux", "-L", self.socket, "-f", os.devnull)

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *words],
            env=without_settings(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def _tmux(self, *words: str) -> str:
        done = self._run(*words)
        if done.returncode:
            raise TmuxFailed(f"tmux {words[0]}: {done.stderr.strip()[:500]}")
        return done.stdout

    def has_tmux(self) -> bool:
        """True if tmux is installed."""
        return shutil.which("tmux") is not None

    def _require(self) -> None:
        if not self.has_tmux():
            raise ConfigError(
                "tmux is not installed: install the package tmux, or run the workers as child processes "
                "(`core4 worker --processes N`)"
            )


def _remind(pid: int) -> None:
    """Have tmux ask how a child of its has ended: on a busy machine it misses that now and then, for good."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid).parent()
        if parent is not None and parent.name().startswith("tmux"):
            parent.send_signal(SIGCHLD)


def _toml(settings: Settings) -> str:
    """A settings file; a JSON text is a TOML text, too."""
    given = settings.to_environ()
    return "".join(
        f"{name.removeprefix(PREFIX).lower()} = {json.dumps(value)}\n" for name, value in given.items()
    )


def supervise_windows(settings: Settings) -> int:
    """Keep the windows of this data folder up until they are told to end; returns the exit code."""
    windows = Windows(settings.home)

    async def follow(pool: Pool, stop: asyncio.Event, halt: asyncio.Event) -> None:
        heard = first
        while True:
            wanted = windows.wanted
            if wanted in (STOP, NOW):
                stop.set()
                if wanted == NOW:
                    halt.set()
            elif wanted.isdigit() and wanted != heard:
                pool.size = Size(int(wanted), int(wanted))
            elif wanted.isdigit() and int(wanted) != pool.size.minimum:
                windows.wanted = wanted = str(pool.size.minimum)  # an operator has ended one
            heard = wanted
            await asyncio.sleep(settings.poll)

    while not (first := windows.wanted):
        time.sleep(LOOK)  # the server is being made
    count = int(first) if first.isdigit() else 0
    with database_url(settings) as url:
        code = supervise(replace(settings, mongo_url=url), Size(count, count), windows, follow)
    windows.kill()
    return code
