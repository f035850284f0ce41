"""The worker's side of its launcher and of the job processes that come from it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core4.config import PREFIX, Settings
from core4.discovery import Problem, without_clashes
from core4.errors import Core4Error
from core4.worker import keeper, protocol
from core4.worker.protocol import Message

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds until a keeper has said which process it keeps
AHEAD_FOR = 60.0  # seconds that a process waits for a job to come
# Settings that jobs may see; all others are the worker's own.
_HANDED_ON = ("data_roots", "dummy_sleep_max", "worker_task_dir")
_PIPE_LIMIT = 64 * 1024
_LOAD_DEATHS = 2  # launchers that may end during one load; each names one more target that must be fresh


class LauncherDied(Core4Error):
    """The launcher ended; another one has to be started."""

    code = "launcher_died"


@dataclass(frozen=True)
class Target:
    """What loading one target came to. `why` says why its jobs need a fresh interpreter each, if they do."""

    name: str
    entries: Sequence[Mapping[str, Any]]
    problems: Sequence[Problem]
    files: Sequence[str]
    why: str | None = None


@dataclass(frozen=True)
class Loaded:
    """The catalogue of one launcher: entries by qual_name, problems, and the files to watch."""

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    files: Collection[str] = ()

    @classmethod
    def of(cls, targets: Sequence[Target]) -> Loaded:
        """All targets together; a name that two classes claim is in none."""
        entries = [{**entry, "fresh": one.why is not None} for one in targets for entry in one.entries]
        unique, clashes = without_clashes(entries)
        return cls(
            entries={entry["_id"]: entry for entry in unique},
            problems=[problem for one in targets for problem in one.problems] + clashes,
            files=frozenset(file for one in targets for file in one.files),
        )


@dataclass(frozen=True)
class Exit:
    """How a job process ended: by exit code or signal; `maxrss` in KiB.

    Of inline jobs more may be known: `why` in words, what that counts as, and where in the code it was.
    """

    code: int | None
    signal: int | None
    maxrss: int
    why: str | None = None
    category: Literal["CRASH", "TIMEOUT"] = "CRASH"
    trace: Sequence[str] = ()

    def described(self, who: str = "the job process") -> str:
        """The end in words."""
        if self.why is not None:
            return self.why
        if self.signal is not None:
            return f"{who} was ended by signal {self.signal} ({_signal_name(self.signal)})"
        return f"{who} ended with exit code {self.code} before it returned a result"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


class JobProcess:
    """One job process with its keeper; made by `Launcher.start`.

    ``pid`` is known, the job waits for its order on `send`. Reads: `channel` (frames), `stdout`, `stderr`.
    """

    def __init__(
        self,
        pid: int,
        channel: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        control: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
        transports: Sequence[asyncio.BaseTransport],
    ) -> None:
        self.pid = pid
        self.keeper: int | None = None
        self.channel, self._to_job = channel
        self._from_keeper, self._to_keeper = control
        self.stdout, self.stderr = stdout, stderr
        self._transports = transports

    @property
    def waits(self) -> bool:
        """False if it has ended before it was given an order."""
        return not (self.channel.at_eof() or self._from_keeper.at_eof())

    def give(self, message: Message) -> None:
        """Give the job its order, or an answer; nobody waits until it has taken that."""
        self._to_job.write(protocol.encode(message))

    async def send(self, message: Message) -> None:
        """The same, until what is on its way is little enough."""
        try:
            self.give(message)
            await self._to_job.drain()
        except ConnectionError:
            return  # it died first; its keeper reports that

    def files_link(self) -> socket.socket:
        """The job's channel once more, as a socket through which files can be sent."""
        return self._to_job.get_extra_info("socket").dup()  # type: ignore[no-any-return]

    def terminate(self) -> None:
        """SIGTERM for the job and all its descendants."""
        self._order(keeper.TERM)

    def kill(self) -> None:
        """SIGKILL for all of them, until none is left."""
        self._order(keeper.KILL)

    def _order(self, order: bytes) -> None:
        if self._to_keeper.is_closing():
            return
        self._to_keeper.write(order)
        # Its job may have stopped it: then it has seen neither the end of the job nor this order.
        if self.keeper is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.keeper, signal.SIGCONT)

    async def wait(self) -> Exit | None:
        """Wait until no process of the job is left; None if the keeper itself was lost."""
        try:
            end = await protocol.read(self._from_keeper)
        except protocol.ProtocolError:
            return None
        return Exit(end["exit"], end["signal"], end["maxrss"]) if end else None

    def close(self) -> None:
        """Give all files back. A job that still runs is killed by its keeper."""
        self._to_job.close()
        self._to_keeper.close()
        for transport in self._transports:
            transport.close()


class Launcher:
    """One launcher process; `spawn` it before this process has threads, `attach` it in the loop."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self._process, self._link = process, link
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        # By whether they are fresh; with what sends them away after a while.
        self._ahead: dict[bool, tuple[asyncio.Task[JobProcess], asyncio.TimerHandle]] = {}
        self.dead = asyncio.Event()

    @classmethod
    def spawn(cls, settings: Settings, environ: Mapping[str, str] | None = None) -> Launcher:
        """Start a launcher process. It knows no setting but those that jobs may see."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                # -P: a file in the working folder must not stand in for a module of the standard library.
                [sys.executable, "-P", "-m", "core4.worker.launcher", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=scrubbed(os.environ if environ is None else environ, settings),
                start_new_session=True,  # a Ctrl-C in the terminal is for the worker alone
            )
        ours.setblocking(False)
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Process id of the launcher."""
        return self._process.pid

    async def load(self, targets: Sequence[str], fresh: Collection[str] = ()) -> list[Target]:
        """Let it import `targets`; those in `fresh` are imported by each job instead.

        Raises: LauncherDied with the target at fault in its facts.
        """
        await self._send({"op": "load", "targets": list(targets), "fresh": list(fresh)})
        loaded: list[Target] = []
        loading = None
        while (message := await self._next()) is not None:
            if "loaded" in message:
                return loaded
            if "loading" in message:
                loading = message["loading"]
            else:
                loaded.append(_target(message["target"]))
        raise LauncherDied("the launcher ended while it loaded jobs", target=loading)

    async def start(self, *, fresh: bool = False, inline: bool = False) -> JobProcess:
        """Start a job process, which waits for its order; with `inline` a host of many.

        Raises: LauncherDied; OSError if this process has no files left.
        """
        files = Files.make()
        try:
            await self._send({"op": "start", "fresh": fresh, "inline": inline}, files.theirs)
        except BaseException:
            files.close_mine()
            raise
        finally:
            files.close_theirs()
        try:
            return await attended(files)
        except TimeoutError:
            self._process.kill()  # a job may have stopped it; those that run go on
            raise LauncherDied("the launcher does not answer") from None

    async def take(self, *, fresh: bool) -> JobProcess:
        """One that was started ahead, or else a new one. Raises: as `start`."""
        if fresh in self._ahead:
            ahead, timer = self._ahead.pop(fresh)
            timer.cancel()
            with contextlib.suppress(LauncherDied, OSError):
                if (process := await ahead).waits:
                    return process
                process.close()
        return await self.start(fresh=fresh)

    def start_ahead(self, *, fresh: bool) -> None:
        """Have a process wait for the next job of this kind: its start is half the way to a body."""
        if fresh in self._ahead or self.dead.is_set():
            return
        ahead = asyncio.create_task(self.start(fresh=fresh))
        timer = asyncio.get_running_loop().call_later(AHEAD_FOR, self._dismiss, fresh)
        self._ahead[fresh] = ahead, timer

    def _dismiss(self, fresh: bool) -> None:
        ahead, timer = self._ahead.pop(fresh)
        timer.cancel()
        ahead.add_done_callback(_close_unused)

    def close(self) -> None:
        """End the launcher; jobs that run go on."""
        if self._link.fileno() < 0:
            return
        for fresh in tuple(self._ahead):
            self._dismiss(fresh)
        if self._reader is not None:
            self._reader.cancel()
            # Before its number can belong to another socket.
            asyncio.get_running_loop().remove_reader(self._link)
        self._link.close()
        self.dead.set()
        self._process.kill()
        self._process.wait()

    async def _send(self, message: Message, files: Sequence[int] = ()) -> None:
        if self.dead.is_set():
            raise LauncherDied
        data = protocol.encode(message)
        async with self._sending:
            try:
                if files:
                    data = data[await self._send_files(data, files) :]
                await asyncio.get_running_loop().sock_sendall(self._link, data)
            except OSError as error:
                raise LauncherDied from error

    async def _send_files(self, data: bytes, files: Sequence[int]) -> int:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.send_fds(self._link, [data], list(files))
            except BlockingIOError:
                free = asyncio.Event()
                loop.add_writer(self._link, free.set)
                try:
                    await free.wait()
                finally:
                    loop.remove_writer(self._link)

    async def _next(self) -> Message | None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        return await self._messages.get()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = protocol.Decoder()
        try:
            while data := await loop.sock_recv(self._link, 1 << 16):
                for message in decoder.feed(data):
                    self._messages.put_nowait(message)
        except (OSError, protocol.ProtocolError) as error:
            log.warning("launcher.lost", extra={"error": str(error)})
        self.dead.set()
        self._messages.put_nowait(None)


def has_failed(ended: asyncio.Task[Any]) -> bool:
    """True if a task has ended without a result."""
    return ended.done() and (ended.cancelled() or ended.exception() is not None)


def _close_unused(ahead: asyncio.Task[JobProcess]) -> None:
    if not has_failed(ahead):
        ahead.result().close()


async def load_all(launcher: Launcher, settings: Settings, targets: Sequence[str]) -> tuple[Launcher, Loaded]:
    """Load `targets`; if the launcher ends meanwhile, again in another one, with the culprit kept fresh.

    Returns the launcher that has them.

    Raises: LauncherDied if it ends without anybody at fault.
    """
    fresh: set[str] = set()
    for _ in range(_LOAD_DEATHS * max(len(targets), 1)):
        try:
            loaded = await launcher.load(targets, fresh)
        except LauncherDied as died:
            launcher.close()
            culprit = died.facts.get("target")
            if culprit is None or culprit in fresh:
                raise
            fresh.add(culprit)
            launcher = Launcher.spawn(settings)
        else:
            return launcher, Loaded.of(loaded)
    raise LauncherDied("launchers end while they load jobs")


def scrubbed(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The environment for jobs: the user's own variables, none of ours but those meant for jobs."""
    kept = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    handed_on = {PREFIX + name.upper() for name in _HANDED_ON}
    return kept | {name: value for name, value in settings.to_environ().items() if name in handed_on}


@dataclass
class Files:
    """The files between the worker and one job; pipes for its output: it may open /dev/stdout anew."""

    channel: socket.socket
    control: socket.socket
    out: int
    err: int
    theirs: list[int]

    @classmethod
    def make(cls) -> Files:
        with contextlib.ExitStack() as undo:
            sockets = [end for _ in range(2) for end in socket.socketpair()]
            for end in sockets:
                undo.callback(end.close)
            pipes: list[int] = []
            for _ in range(2):
                pipes += os.pipe()
                undo.callback(os.close, pipes[-1])
                undo.callback(os.close, pipes[-2])
            undo.pop_all()
        channel, their_channel, control, their_control = sockets
        out, their_out, err, their_err = pipes
        # In the order that the launcher expects.
        theirs = [their_channel.detach(), their_out, their_err, their_control.detach()]
        return cls(channel, control, out, err, theirs)

    def close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)

    def close_mine(self) -> None:
        self.channel.close()
        self.control.close()
        os.close(self.out)
        os.close(self.err)


async def _reading(fd: int) -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    reader = asyncio.StreamReader(limit=_PIPE_LIMIT)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    return reader, transport


def _target(report: Message) -> Target:
    return Target(
        name=report["target"],
        entries=report["entries"],
        problems=[Problem(**problem) for problem in report["problems"]],
        files=report["files"],
        why=report.get("why"),
    )


async def attended(files: Files) -> JobProcess:
    """The job process at the other end of these files, as soon as its keeper says which it is.

    Raises: LauncherDied if it ended before; TimeoutError.
    """
    channel_streams = await asyncio.open_connection(sock=files.channel)
    control_streams = await asyncio.open_connection(sock=files.control)
    out_stream, out_transport = await _reading(files.out)
    err_stream, err_transport = await _reading(files.err)
    job = JobProcess(
        -1, channel_streams, control_streams, out_stream, err_stream, (out_transport, err_transport)
    )
    try:
        async with asyncio.timeout(START_TIMEOUT):
            first = await protocol.read(control_streams[0])
    except BaseException:
        job.close()
        raise
    if first is None or "pid" not in first:
        job.close()
        raise LauncherDied((first or {}).get("error", "the launcher ended before it started the job"))
    job.pid, job.keeper = first["pid"], first["keeper"]
    return job
