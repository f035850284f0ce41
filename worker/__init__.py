"""The worker side: claims jobs and runs each in a process of its own.

Kept light: job processes import modules of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core4.config import Settings


def main(settings: Settings) -> int:
    """Run a worker in the foreground until SIGTERM or SIGINT; returns the exit code. Main thread only."""
    from core4.worker.entry import run

    return run(settings)
