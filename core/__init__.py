"""core4-jobs: enqueue jobs over HTTP, watch them live, kill them, restart them, never lose one.

The names below are loaded when they are first used: a job's module that says
``from core4 import CoreJob`` gets neither a database driver nor asyncio with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core4.client import Client as Client
    from core4.decorated import task as task
    from core4.errors import Core4Error as Core4Error
    from core4.jobs import Job as Job
    from core4.manager import JobManager as JobManager
    from core4.manager import JobWorker as JobWorker
    from core4.queues import JobQueue as JobQueue
    from core4.scripts import subprocess as subprocess
    from core4.states import State as State
    from core4.tasks import CoreAbstractMixin as CoreAbstractMixin
    from core4.tasks import CoreJob as CoreJob

_HOME = {
    "Client": "core4.client",
    "Core4Error": "core4.errors",
    "CoreAbstractMixin": "core4.tasks",
    "CoreJob": "core4.tasks",
    "Job": "core4.jobs",
    "JobManager": "core4.manager",
    "JobQueue": "core4.queues",
    "JobWorker": "core4.manager",
    "State": "core4.states",
    "subprocess": "core4.scripts",
    "task": "core4.decorated",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms that a job process does not need

        return version("core4-jobs")
    if name not in _HOME:
        raise AttributeError(f"module 'core4' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
