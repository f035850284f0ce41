"""Jobs that ship with the product: one that only takes time, one that reads a real file."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from core4.tasks import CoreJob


class DummyJob(CoreJob):
    """Sleep for some seconds and report the progress of it."""

    author = "core4-jobs"
    qual_name = "core4.queue.helper.job.example.DummyJob"
    tag = ["example"]  # noqa: RUF012 - options of a job read like this everywhere
    progress_interval = 1

    def execute(self, sleep: float = 3, loop_time: float = 0.5, logging: bool = False) -> None:
        """
        Args:
            sleep: seconds to sleep
            loop_time: seconds between two lines of output
            logging: write a log line per loop, too
        """
        longest = os.environ.get("CORE4_DUMMY_SLEEP_MAX")  # for tests that run documents as they are written
        total = min(sleep, float(longest)) if longest else sleep
        pause = max(loop_time, 0.01)
        self.logger.info("sleeping for %g sec.", total)
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < total:
            print(f"slept {elapsed:.1f} of {total:g} sec.")
            if logging:
                self.logger.info("slept %.1f of %g sec.", elapsed, total)
            self.progress(elapsed / total, "slept %.1f of %g sec.", elapsed, total)
            time.sleep(min(pause, total - elapsed))


# One request in the combined log format, with the seconds it took at the end.
_LINE = re.compile(
    r'\S+ \S+ \S+ \[[^:\]]+:(?P<hour>\d\d):[^\]]+\] "[A-Z]+ (?P<path>[^\s"]++)[^"]*+" '
    r'(?P<status>\d{3}) (?P<size>\d+|-) "[^"]*" "[^"]*" (?P<seconds>\d+(?:\.\d+)?)\s*$'
)


@dataclass
class _Times:
    """How long the requests of one path took, in seconds."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass
class _Report:
    """What is counted while the log is read."""

    lines: int = 0
    unreadable: int = 0
    bytes: int = 0
    status: Counter[str] = field(default_factory=Counter)
    hours: Counter[str] = field(default_factory=Counter)
    paths: dict[str, _Times] = field(default_factory=dict)

    def add(self, line: str) -> None:
        self.lines += 1
        found = _LINE.match(line)
        if found is None:
            self.unreadable += 1
            return
        self.status[found["status"]] += 1
        self.hours[found["hour"]] += 1
        self.bytes += 0 if found["size"] == "-" else int(found["size"])
        path = found["path"].partition("?")[0]
        self.paths.setdefault(path, _Times()).add(float(found["seconds"]))

    def result(self, top: int) -> dict[str, Any]:
        slowest = sorted(self.paths.items(), key=lambda item: (-item[1].mean, item[0]))[:top]
        return {
            "requests": self.lines - self.unreadable,
            "unreadable": self.unreadable,
            "bytes": self.bytes,
            "by_status": _sorted(self.status),
            "by_hour": _sorted(self.hours),
            "slowest": [
                {"path": path, "count": t.count, "mean": round(t.mean, 3), "longest": round(t.longest, 3)}
                for path, t in slowest
            ],
        }


class AccessLogReport(CoreJob):
    """Read the access log of a web server: requests by status, by hour, and the slowest paths.

    Reads the log in the combined format with the request time as its last field. Returns the report.
    """

    author = "core4-jobs"
    tag = ["example"]  # noqa: RUF012
    progress_interval = 1

    SHIPPED: ClassVar[Path] = Path(__file__).with_name("data")
    BLOCK: ClassVar[int] = 1000  # lines between two reports of progress

    def execute(self, path: str | None = None, top: int = 10, pace: float = 0.0) -> dict[str, Any]:
        """
        Args:
            path: log file: the name of a shipped one, or a path below the folders in CORE4_DATA_ROOTS
            top: how many of the slowest paths to name
            pace: seconds to pause after each 1000 lines, to watch it work
        """
        file = self._allowed(path or "access.log")
        size = max(file.stat().st_size, 1)
        self.logger.info("reading %s, %.1f MB", file.name, size / 1e6)
        report, done = _Report(), 0
        with file.open("rb") as source:
            while block := list(islice(source, self.BLOCK)):
                for line in block:
                    report.add(line.decode(errors="replace"))
                done += sum(map(len, block))
                self.logger.info("%d lines read, %d unreadable", report.lines, report.unreadable)
                self.progress(done / size, "%d lines", report.lines)
                time.sleep(max(pace, 0.0))
        if report.unreadable:
            self.logger.warning("%d lines are not in the combined format", report.unreadable)
        return report.result(max(top, 0))

    def _allowed(self, path: str) -> Path:
        """The file that `path` names, if this job may read it; links are followed before that is decided."""
        folders = [self.SHIPPED, *_data_roots(os.environ)]
        for folder in folders:
            file = (folder / path).resolve()
            if file.is_relative_to(folder.resolve()) and file.is_file():
                return file
        raise PermissionError(
            f"{path}: no file that this job may read; it reads the files it ships with and those below "
            "the folders which the operator names in CORE4_DATA_ROOTS"
        )


def _data_roots(environ: Mapping[str, str]) -> Iterator[Path]:
    text = environ.get("CORE4_DATA_ROOTS", "").strip()
    names = json.loads(text) if text.startswith("[") else text.split(",")
    for name in names:
        if name.strip():
            yield Path(name.strip()).expanduser()


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {key: counts[key] for key in sorted(counts)}
