"""One claimed job, from its process to its outcome."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from core4 import identifiers
from core4.attendance import TROUBLE
from core4.config import Settings
from core4.errors import LeaseLost, SourceRefused
from core4.jobs import Job, utcnow
from core4.logs import LEVELS
from core4.options import OPTIONS
from core4.retries import Outcome, decide
from core4.states import Flag, State
from core4.transitions import shortened
from core4.waits import heard
from core4.worker import protocol
from core4.worker.backend import Backend
from core4.worker.calls import Calls
from core4.worker.children import Children
from core4.worker.functions import Functions, Prepared
from core4.worker.handle import Exit, JobProcess, Launcher, LauncherDied
from core4.worker.host import MOST_EVICTIONS, Evicted, Hosts, InlineJob
from core4.worker.limits import Limits
from core4.worker.local import Local, LoopJob
from core4.worker.output import JobLog, Splitter
from core4.worker.protocol import Message, ProtocolError
from core4.worker.slots import Slots
from core4.worker.watch import Watch

log = logging.getLogger(__name__)

LOG_PATIENCE = 30.0  # seconds that the finish waits until a busy database has the last lines
PIPE_PATIENCE = 5.0  # seconds for the rest of the output after the last process is gone
PROGRESS_EVERY = 1.0  # seconds between two progress writes
_FRAME_MARGIN = 1024 * 1024  # bytes of a frame beside the result in it
_CHUNK = 64 * 1024
_LONG_DELAY = 60.0  # seconds until a job is due again whose end nobody can record
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0  # seconds between two tries of a write
_FLAGGED: Mapping[Flag, str] = {  # core4's words
    "wall": "successfully set non-stop job",
    "zombie": "successfully set zombie job",
}

T = TypeVar("T")
Why = Literal["kill", "limit", "drain", "lost"]
Running = JobProcess | InlineJob | LoopJob


class Execution:
    """Runs one job that this worker holds; `run` once, end it early with `kill`, `stop` or `abandon`."""

    def __init__(
        self,
        job: Job,
        entry: Mapping[str, Any],
        *,
        begun: bool,
        backend: Backend,
        launcher: Launcher,
        hosts: Hosts,
        settings: Settings,
        hostname: str,
        slots: Slots,
        watch: Watch,
        time_left: Callable[[], float],
        functions: Functions,
        local: Local | None = None,
    ) -> None:
        assert job.lease is not None
        self.job, self.lease_id = job, job.lease.id
        self.keeper: int | None = None  # the process below which all of the job's are, while there are any
        self._begun, self._local = begun, local
        self._entry, self._launcher, self._hosts = entry, launcher, hosts
        self._backend, self._settings, self._hostname = backend, settings, hostname
        self._functions, self._time_left = functions, time_left
        self._prepared: Prepared | None = None  # of a shipped function
        self._children = Children(job, backend, hostname=hostname)
        self._calls, self._slots = Calls(job, self._children, backend, watch, slots), slots
        self._ended: Message | None = None  # the frame with the job's own end
        self._broken: str | None = None  # what was wrong with a frame
        self._joblog: JobLog | None = None
        self._token: str | None = None  # what each frame of the file of a task carries
        self._why: Why | None = None
        self._limits = Limits(job, self._exceed, settings.worker_timeout, lambda: self._calls.waiting)
        self._exceeded: Outcome | None = None
        self._evicted: Evicted | None = None
        self._splitters = {"stdout": Splitter(), "stderr": Splitter()}
        self._kill_asked = False
        self._grace = settings.grace
        self._stopping, self._lost = asyncio.Event(), asyncio.Event()
        self._progress: tuple[float, str] | None = None
        self._progressed = asyncio.Event()
        self._helpers: list[asyncio.Task[None]] = []  # beside the job, to its end
        self._late: asyncio.TimerHandle | None = None  # a process that has reported its end has to go

    def kill(self) -> None:
        """End the job on request: TERM, the grace period, KILL; recorded as killed."""
        self._kill_asked = True
        self._stop("kill", self._settings.grace)

    def stop(self, grace: float) -> None:
        """End the job because the worker stops: it goes back in line, uncharged."""
        self._stop("drain", grace)

    def abandon(self) -> None:
        """The lease is lost: end all processes at once and write nothing more."""
        self._stop("lost", 0.0)
        self._lost.set()

    def count(self, processes: int) -> None:
        """There are so many processes of the job: end it if they are more than it may have."""
        most = self._settings.max_processes
        if processes > most:
            reason = f"processes: it had {processes}, {most} are allowed"
            self._exceed(Outcome.crashed(reason), at_once=True)

    def _exceed(self, outcome: Outcome, *, at_once: bool = False) -> None:
        """End the job because of one of its limits; what it says from now on does not count."""
        if self._ended is None and self._why is None:
            self._exceeded = outcome
            self._stop("limit", 0.0 if at_once else self._settings.grace)

    def _stop(self, why: Why, grace: float) -> None:
        if self._why is None or why == "lost":
            self._why, self._grace = why, grace
        self._stopping.set()

    async def run(self) -> None:
        """Run the job to its outcome and record that."""
        identifiers.bind(self._identity())
        try:
            try:
                await self._run()
            except LeaseLost:
                raise
            except Exception as error:
                await self._fail(error)
        except LeaseLost as lost:
            log.warning("job.lease_lost", extra={"detail": lost.detail})

    async def _fail(self, error: Exception) -> None:
        """What nobody foresaw ends this job, charged: given back, it would do the same to the next worker."""
        log.error("job.unforeseen", exc_info=error)
        outcome = Outcome.failed(f"its worker failed at it: {error!r:.500}", [])
        try:
            self.job = await self._persist(lambda: self._backend.start(self.job, pid=os.getpid()))
            await self._record(outcome, self._joblog.last_seq if self._joblog else 0)
        except LeaseLost:
            raise
        except Exception as broken:  # its document may be broken: that keeps no other from running
            log.critical("job.unrecorded", exc_info=broken)
            await self._release(f"its end cannot be recorded: {broken!r:.200}", delay=_LONG_DELAY)

    def _identity(self) -> dict[str, Any]:
        """What every line about this execution carries."""
        return {
            "job_id": str(self.job.id),
            "job": self.job.name,
            "attempt": self.job.trial + bool(self.job.claims),
            "lease": self.lease_id,
            "request_id": self.job.document.get("request_id"),
        }

    async def _run(self) -> None:
        if self.job.document.get("function") is None:
            await self._run_in_process()
            return
        try:
            self._prepared = await self._persist(lambda: self._functions.prepare(self.job))
            await self._run_in_process()
        except SourceRefused as refused:
            log.warning("function.refused", extra={"reason": refused.detail})
            self.job = await self._persist(lambda: self._backend.start(self.job, pid=os.getpid()))
            await self._record(Outcome.failed(f"refused: {refused.detail}", []), 0)
        finally:
            if self._prepared is not None:
                await asyncio.to_thread(self._prepared.close)

    async def _run_in_process(self) -> None:
        try:
            process = await self._begin()
        except (LauncherDied, OSError) as error:
            await self._release(f"no process for it: {error}", delay=1.0)
            return
        try:
            if self._stopping.is_set():
                await self._release("the worker stops")
                return
            # The process waits: it has its order only when the start is recorded.
            if not self._begun:
                self.job = await self._persist(lambda: self._backend.start(self.job, pid=process.pid))
            if self._prepared is not None:
                # It may have been revoked while its process was made.
                await self._persist(lambda: self._functions.source(self.job))
            if self._time_left() <= 0:
                # This worker was frozen since it claimed: somebody else may have the job by now.
                raise LeaseLost(self.job.id, self.lease_id)
            if self.job.killed_at is not None:
                self.kill()  # flagged between claim and start, when nobody listened yet
            await self._attend(process)
        finally:
            process.close()

    async def _begin(self) -> Running:
        """A place for the job, which waits there for its order.

        Raises: LauncherDied, OSError.
        """
        if self._prepared is not None:
            return await self._functions.start()
        if self._local is not None and not self._is_script():
            return await self._local.start(self._entry)
        if is_inline(self.job, self._entry):
            return await self._hosts.start(self._launcher, str(self.job.id))
        return await self._launcher.take(fresh=self._is_fresh())

    def _is_fresh(self) -> bool:
        return bool(self._entry["fresh"] or self._is_script())

    def _is_script(self) -> bool:
        return bool(self._entry["runs"] == "script")

    async def _attend(self, process: Running) -> None:
        started = time.monotonic()
        self.keeper = process.keeper
        self._limits.begin()
        joblog = self._joblog = JobLog(self._backend, self.job, self._hostname, self._settings)
        writer = asyncio.create_task(joblog.run())
        try:
            process.give(self._order())  # nothing of what it says is read before the next lines
            if isinstance(process, JobProcess) and self._prepared is None:
                self._launcher.start_ahead(fresh=self._is_fresh())
            joblog.write("INFO", "start execution")
            log.info("job.started", extra={"pid": process.pid})
            how = await self._watch(process, joblog)
            self._slots.end(self.job)
            if self._why == "lost":
                raise LeaseLost(self.job.id, self.lease_id)
            outcome = self._outcome(how)
            self._write_end(joblog, outcome, time.monotonic() - started)
            await joblog.close(writer, LOG_PATIENCE)
        except Exception:
            process.kill()
            await process.wait()  # nothing of it runs beside the next attempt
            raise
        finally:
            writer.cancel()
        await self._record(outcome, joblog.last_seq)

    async def _watch(self, process: Running, joblog: JobLog) -> Exit | Evicted | None:
        """Follow the job until nothing of it is left."""
        outputs = {"stdout": process.stdout, "stderr": process.stderr}
        readers = [
            asyncio.create_task(self._read_frames(process, joblog)),
            # An inline job has none: what it prints comes as frames.
            *(
                asyncio.create_task(self._read_output(source, name, joblog))
                for name, source in outputs.items()
                if not source.at_eof()
            ),
        ]
        self._helpers += [
            asyncio.create_task(self._end_early(process)),
            *map(asyncio.create_task, self._limits.parts(process.pid, partial(self._mark, joblog))),
        ]
        try:
            how = await process.wait()
            if not self._lost.is_set():
                await asyncio.wait(readers, timeout=PIPE_PATIENCE)
                self._end_output(joblog)
            return how
        finally:
            await self._calls.close(lost=self._lost.is_set())
            if self._late is not None:
                self._late.cancel()
            parts = (*readers, *self._helpers)
            for task in parts:
                task.cancel()
            for result in await asyncio.gather(*parts, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("job.helper_failed", exc_info=result)

    def _order(self) -> Message:
        job = self.job
        # A program that the file of a task starts is not to speak for the job.
        self._token = secrets.token_hex(16) if self._is_script() else None
        script = {"script": self._entry["script"], "token": self._token} if self._token else {}
        return {
            **script,
            "job": {
                "id": str(job.id),
                "name": job.name,
                "args": dict(job.args),
                "attempt": job.trial,
                "options": {name: job.document.get(name) for name in OPTIONS},
            },
            "entry": {name: self._entry[name] for name in ("target", "module", "qualname")},
            "result_limit": self._settings.result_cap,
            "log_limit": self._settings.log_cap,
            **(self._prepared.order if self._prepared else {}),
        }

    # ------------------------------------------------------------------ while it runs

    async def _read_frames(self, process: Running, joblog: JobLog) -> None:
        limit = self._settings.result_cap + _FRAME_MARGIN
        try:
            while (message := await protocol.read(process.channel, limit)) is not None:
                if self._token is not None and message.pop("token", None) != self._token:
                    raise ProtocolError("a frame came without the token of the job")
                if {"enqueue", "call", "drop"} & message.keys():
                    await self._take_question(process, message)
                else:
                    self._take(message, process, joblog)
                await joblog.room()
        except ProtocolError as error:
            self._broken = error.detail
            process.kill()
        except LeaseLost:
            self.abandon()
        except Exception as error:  # else the job would wait for an answer that nobody gives
            log.error("job.helper_failed", exc_info=error)
            self._broken = f"a frame of the job could not be handled: {error!r:.200}"
            process.kill()

    async def _take_question(self, process: Running, message: Message) -> None:
        """What the job asks for: the id of a new job at once, the result of one when it has ended.

        Raises: ProtocolError; LeaseLost.
        """
        try:
            if "drop" in message:
                self._calls.drop(int(message["drop"]))
                return
            number = int(message["number"])
            if self._prepared is not None:
                # What jobs ask for is held against nobody's rights: that is for the operator's own code.
                refused = {"reason": "no_queue", "detail": "a shipped function enqueues no jobs"}
                await self._answer(process, {"answer": number, "refused": refused})
                return
            if "call" in message:
                self._calls.begin(number, message["call"], self._persist, partial(self._answer, process))
                return
            answer = await self._children.enqueue(message["enqueue"], self._persist)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ProtocolError(f"a frame of the job makes no sense: {error!r:.200}") from None
        await process.send({"answer": number, **answer})

    async def _answer(self, process: Running, message: Message) -> None:
        self._limits.heard()
        await process.send(message)

    def _take(self, message: Message, process: Running, joblog: JobLog) -> None:
        """One frame of the job, which may be anything.

        Raises: ProtocolError.
        """
        try:
            if "log" in message:
                _write_record(joblog, message["log"])
            elif "output" in message:
                source, text = message["output"]["source"], message["output"]["text"]
                self._hear(source, text.encode("utf-8", "backslashreplace"), joblog)
            elif "progress" in message:
                value, text = float(message["progress"]["value"]), str(message["progress"]["message"])
                if self._progress is None:
                    self._helpers.append(asyncio.create_task(self._write_progress()))
                # In this order a NaN becomes 0.
                self._progress = min(max(0.0, value), 1.0), text[: protocol.TEXT_LIMIT]
                self._progressed.set()
                self._limits.heard()
            elif self._ended is None:
                self._ended = _checked_end(message)
                self._late = asyncio.get_running_loop().call_later(self._settings.grace, process.kill)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"a frame of the job makes no sense: {error!r:.200}") from None

    async def _read_output(self, source: asyncio.StreamReader, name: str, joblog: JobLog) -> None:
        while data := await source.read(_CHUNK):
            self._hear(name, data, joblog)
            await joblog.room()

    def _hear(self, name: str, data: bytes, joblog: JobLog) -> None:
        if joblog.cut:
            return  # read, so that the job goes on; a flood must not keep the worker from its heartbeat
        for line in self._splitters[name].feed(data):
            joblog.write_output("INFO", line, source=name)

    def _end_output(self, joblog: JobLog) -> None:
        for name, splitter in self._splitters.items():
            for line in splitter.end():
                joblog.write_output("INFO", line, source=name)

    async def _end_early(self, process: Running) -> None:
        """The ladder: TERM, grace, KILL; a lost lease has no time for that, nor has a machine for memory."""
        await self._stopping.wait()
        if self._grace > 0:
            process.terminate()
            await heard(self._lost, self._grace)
        process.kill()

    async def _write_progress(self) -> None:
        pause = PROGRESS_EVERY
        while True:
            await self._progressed.wait()
            self._progressed.clear()
            assert self._progress is not None
            try:
                await self._backend.progress(self.job, *self._progress)
                pause = PROGRESS_EVERY
            except LeaseLost:
                self.abandon()
                return
            except TROUBLE as error:
                log.warning("job.progress_delayed", extra={"error": str(error)[:200]})
                pause = min(pause * 2, _LAST_PAUSE)
                self._progressed.set()
            await asyncio.sleep(pause)

    async def _mark(self, joblog: JobLog, what: Flag, reason: str) -> None:
        """Store a flag; once per job, however many attempts exceed the time."""
        if self.job.document.get(f"{what}_at") is not None:
            return
        try:
            self.job = await self._persist(lambda: self._backend.flag(self.job, what, reason=reason))
        except LeaseLost:
            self.abandon()
            return
        joblog.write("WARNING", _FLAGGED[what])
        log.warning("job.flagged", extra={"reason": reason})

    # ------------------------------------------------------------------ the end

    def _outcome(self, how: Exit | Evicted | None) -> Outcome | None:
        """What the attempt came to; None if it does not count and the job goes back in line."""
        if self._exceeded is not None:
            return self._exceeded
        ended = self._ended or {}
        if "complete" in ended:
            return Outcome.complete(ended["complete"]["result"])
        if self._why == "kill":
            return Outcome.killed("killed on request")
        if "deferred" in ended:
            return Outcome.deferred(ended["deferred"]["message"])
        if self._why == "drain":
            return None
        if "failed" in ended:
            return Outcome.failed(ended["failed"]["message"], ended["failed"]["traceback"])
        if self._broken is not None:
            return Outcome.crashed(self._broken)
        if isinstance(how, Evicted):
            self._evicted = how
            return None
        if how is None:
            return Outcome.crashed("the job process and its keeper were lost")
        make = Outcome.timed_out if how.category == "TIMEOUT" else Outcome.crashed
        return make(how.described(), list(how.trace) or None)

    def _write_end(self, joblog: JobLog, outcome: Outcome | None, seconds: float) -> None:
        if outcome is None:
            joblog.write("WARNING", f"execution given up after [{seconds:.1f}] sec.: {self._why_released()}")
            return
        seen = replace(self.job, killed_at=utcnow()) if self._kill_asked else self.job
        state = decide(seen, outcome, utcnow()).state
        message = f"done execution with [{state}] after [{seconds:.1f}] sec."
        if state in (State.FAILED, State.ERROR):
            exception = {"info": outcome.exception or "", "text": outcome.traceback or []}
            joblog.write("CRITICAL", message, exception=exception)
        else:
            joblog.write("INFO", message)
        log.info("job.ended", extra={"state": state, "seconds": round(seconds, 3)})

    async def _record(self, outcome: Outcome | None, log_seq: int) -> None:
        if outcome is None:
            await self._release(self._why_released(), evicted=self._evictions())
        else:
            await self._persist(lambda: self._backend.finish(self.job, outcome, log_seq=log_seq))

    def _why_released(self) -> str:
        return self._evicted.reason if self._evicted else "the worker stops"

    def _evictions(self) -> int:
        """What is added to the job's count: who is suspected runs alone at once."""
        if self._evicted is None:
            return 0
        return MOST_EVICTIONS if self._evicted.suspected else 1

    async def _release(self, reason: str, *, delay: float = 0.0, evicted: int = 0) -> None:
        await self._persist(
            lambda: self._backend.release(self.job, reason=reason, delay=delay, evicted=evicted)
        )

    async def _persist(self, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write that is safe to repeat until it is done or the lease is lost.

        Raises: LeaseLost.
        """
        pause = _FIRST_PAUSE
        while not self._lost.is_set():
            try:
                return await write()
            except TROUBLE as error:
                log.warning("job.write_delayed", extra={"error": str(error)[:200]})
            await heard(self._lost, pause)
            pause = min(pause * 2, _LAST_PAUSE)
        raise LeaseLost(self.job.id, self.lease_id)


def is_inline(job: Job, entry: Mapping[str, Any]) -> bool:
    """True if the job runs on a loop with others, in a host or in the application itself."""
    if entry["runs"] != "inline" or entry["fresh"]:
        return False  # what must not be imported in the launcher cannot be in a host
    # An old order may have a limit that inline jobs cannot have any more.
    return job.evicted < MOST_EVICTIONS and job.memory_limit is None


def _write_record(joblog: JobLog, record: Mapping[str, Any]) -> None:
    level, epoch = record["level"], record["epoch"]
    exception = record.get("exception")
    joblog.write_output(
        level if level in LEVELS else "INFO",
        str(record["message"]),
        epoch=float(epoch) if _is_epoch(epoch) else None,
        exception=None
        if exception is None
        else {"info": str(exception["info"]), "text": [str(line) for line in exception["text"]]},
    )


def _is_epoch(value: Any) -> bool:
    return (
        isinstance(value, int | float) and math.isfinite(value) and 0 <= value < 253_402_300_800
    )  # year 10000


def _checked_end(message: Message) -> Message:
    if "complete" in message:
        return {"complete": {"result": message["complete"]["result"]}}
    kind = "deferred" if "deferred" in message else "failed"
    end = message[kind]
    # Of both no more than what is stored: the worker writes them to the log, too.
    message_text = str(end["message"])[: protocol.TEXT_LIMIT]
    return {kind: {"message": message_text, "traceback": shortened(end["traceback"])}}
