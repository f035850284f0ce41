"""The processes of a chaos run: each is started again whenever it is gone, and its last words are kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from core4.embedded import EmbeddedServer
from tests.helpers import ROOT, Command, program


@dataclass
class Part:
    """One process of the stack, started again whenever it is gone."""

    name: str
    args: Sequence[str]
    environ: dict[str, str]
    marks: list[str] = field(default_factory=list)
    command: Command | None = None
    paused_until: float | None = None
    output: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`worker` or `api`."""
        return self.name.rstrip("0123456789")

    @property
    def pid(self) -> int:
        assert self.command is not None
        return self.command.process.pid

    def ensure(self) -> None:
        """Start it unless it runs."""
        if self.command is not None and self.command.process.poll() is None:
            return
        self.forget()
        self.command = Command([program("core4"), *self.args], self.environ, cwd=ROOT).start()
        self.marks.append(self.command.mark)

    def wait(self) -> None:
        """Wait until it says that it is ready."""
        assert self.command is not None
        self.command.wait_for("ready")

    def signal(self, number: int) -> None:
        assert self.command is not None
        self.command.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def pause(self, until: float) -> None:
        """Freeze it; the job processes go on."""
        self.signal(signal.SIGSTOP)
        self.paused_until = until

    def wake(self) -> None:
        self.signal(signal.SIGCONT)
        self.paused_until = None

    def forget(self) -> None:
        """Wait for its end and keep what it has written."""
        if self.command is not None:
            self.command.wait()
            self.output.append(self.command.output[-20_000:])
            if self.command.process.stdout:
                self.command.process.stdout.close()

    def end(self, folder: Path) -> None:
        """Kill all that is left of it; its output goes into a file."""
        if self.command is not None:
            self.command.kill_everything()
            self.forget()
        (folder / f"{self.name}.log").write_text("\n----- killed -----\n".join(self.output))


class Server(EmbeddedServer):
    """The database of the run, which can die like everybody else."""

    @property
    def port(self) -> int:
        return int(self.url.partition("//127.0.0.1:")[2].partition("/")[0])

    def kill(self) -> None:
        """kill -9, and start it again on its data."""
        for process in psutil.Process(os.getpid()).children(recursive=True):
            try:
                if any("secantusd" in word or "mongod" in word for word in process.cmdline()):
                    process.kill()
            except psutil.Error:
                continue
        self.stop()
        self.start()
