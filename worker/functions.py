"""The worker's side of shipped functions: what may run, with what, and from which launcher."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core4.actions import verified
from core4.config import Settings
from core4.errors import ConfigError, SourceRefused
from core4.functions import NAMESPACE, record
from core4.jobs import Job
from core4.sources import Source
from core4.worker import confine, shipped
from core4.worker.backend import Backend
from core4.worker.folders import Folder, sweep
from core4.worker.handle import JobProcess, Launcher, LauncherDied
from core4.worker.protocol import Message

ENTRY: Mapping[str, Any] = {"runs": "process", "fresh": False, "target": "", "module": "", "qualname": ""}


def require(settings: Settings) -> None:
    """Whether a worker with these settings can run functions, if it shall.

    Raises: ConfigError, CannotConfine.
    """
    if not settings.functions:
        return
    if not settings.function_keys:
        raise ConfigError(
            "CORE4_FUNCTIONS is set and CORE4_FUNCTION_KEYS is not: a worker runs the functions of those "
            "whose keys it has; `core4 function key NAME` makes one"
        )
    confine.require()


def namespaces(settings: Settings) -> tuple[str, ...]:
    """Where a worker with these settings looks for jobs: functions have a place of their own."""
    # A worker for debug jobs has nothing else, be it functions or not.
    more = (NAMESPACE,) if settings.functions and not settings.worker_debug else ()
    return tuple(dict.fromkeys((*settings.namespaces, *more)))


@dataclass(frozen=True)
class Prepared:
    """One call that may run: what its order has beside that of any job. `close` it when the job has ended."""

    order: Message
    folder: Folder

    def close(self) -> None:
        """Delete the folder that was the function's own."""
        self.folder.close()


class Functions:
    """Runs functions for one worker, from a launcher that knows no settings, no jobs and no secrets."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend, self._settings, self._keys = backend, settings, settings.signers()
        self._launcher: Launcher | None = None

    @property
    def on(self) -> bool:
        """True if this worker runs functions."""
        return self._settings.functions

    async def prepare(self, job: Job) -> Prepared:
        """What this call needs to run.

        Raises: as `source`.
        """
        source = await self.source(job)
        about = record(job.document)
        wants = source.wants_context and shipped.CONTEXT not in job.args
        results = await self._backend.dependencies(job) if wants else {}
        folder = Folder.make()
        told = {
            "code": source.code,
            "method": source.method,
            "context": wants,
            "results": results,
            "folder": str(folder.path),
            "folders": list(self._settings.function_folders),
            "ports": [int(port) for port in self._settings.function_ports],
            "job": {
                "name": about["name"],
                "category": about["category"],
                "dependencies": [str(each) for each in about["dependencies"]],
            },
        }
        return Prepared({"function": told}, folder)

    async def source(self, job: Job) -> Source:
        """What the job calls, as it is stored now; checked with this worker's own keys, whoever sent it.

        Raises: SourceRefused if it must not run; one of `TROUBLE`.
        """
        function: Mapping[str, Any] = job.document["function"]
        action = await self._backend.action(job)
        if action is None:
            raise SourceRefused(f"action [{function['key']}] is gone")
        return verified(action, function, self._keys)

    async def start(self) -> JobProcess:
        """A process for a function, which waits for its order.

        Raises: LauncherDied; OSError.
        """
        if self._launcher is None or self._launcher.dead.is_set():
            self.close()
            self._launcher = Launcher.spawn(self._settings, shipped.environment(os.environ))
        launcher = self._launcher
        try:
            return await launcher.start()
        except LauncherDied:
            if launcher is self._launcher:
                self.close()
            raise

    async def sweep(self) -> None:
        """Delete the folders of functions whose worker was killed; it may take a while."""
        await asyncio.to_thread(sweep)

    def close(self) -> None:
        """End the launcher; what runs goes on."""
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None
