"""The gate of a worker: while the machine is short of processor or memory, only forced jobs start."""

from __future__ import annotations

import statistics
from collections import deque

import psutil

CPU_WINDOW = 20  # samples, one a second: a peak alone closes nothing, and a burst does not go unseen
_MIB = 1024 * 1024


class Gate:
    """Open or closed; `look` once a second.

    Args:
        max_cpu: percent of all cores, as a mean over the window; 100 is never exceeded.
        min_free_ram: bytes that processes can get without swapping (`available`).
    """

    def __init__(self, max_cpu: float, min_free_ram: int) -> None:
        self._max_cpu, self._min_free_ram = max_cpu, min_free_ram
        self._loads: deque[float] = deque(maxlen=CPU_WINDOW)
        self.reason: str | None = None  # why it is closed
        psutil.cpu_percent()  # each later call is about the time since the one before

    def look(self) -> bool:
        """Measure; True if the gate was opened or closed by it."""
        return self.judge(psutil.cpu_percent(), psutil.virtual_memory().available)

    def judge(self, cpu: float, available: int) -> bool:
        """The same with what was measured: percent of all cores and bytes."""
        self._loads.append(cpu)
        reason = self._shortage(available)
        changed = (reason is None) != (self.reason is None)
        if changed:
            self.reason = reason
        return changed

    def _shortage(self, available: int) -> str | None:
        if available < self._min_free_ram:
            return (
                f"memory: {available // _MIB} MiB available, min_free_ram is {self._min_free_ram // _MIB} MiB"
            )
        load = statistics.fmean(self._loads)
        if len(self._loads) == CPU_WINDOW and load > self._max_cpu:
            return f"cpu: {load:.1f} % of all cores over {CPU_WINDOW} s, max_cpu is {self._max_cpu:g}"
        return None
