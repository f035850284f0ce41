"""``python -m tests.bench.journal``: list pages of a large journal, beside the bare query and a small one.

The documents are those of a job that has run, stored straight in the collection. Each answer's time and the
processor time of the database are taken; a page that stays fast costs as much with many entries as with few.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from core4.store import COUNTED, JOURNAL
from tests.bench.stand import Stand, stand
from tests.helpers import ADMIN, BASE

Document = dict[str, Any]
PER_PAGE = 20
SMALL = 1_000  # entries that everything is compared to
BARE = "bare: newest of all"
NEWEST, FILTER = '[["_id",-1]]', '{"state":"complete"}'


class Lists:
    """The API's lists, and the queries below them."""

    def __init__(self, here: Stand) -> None:
        self.here, self.session = here, requests.Session()
        self.session.auth = ADMIN
        self.table = here.tables[JOURNAL]

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Document:
        """An answer that must be 200."""
        url = f"http://127.0.0.1:{self.here.port}{BASE}{path}"
        answer = self.session.get(url, params={**(params or {})}, timeout=600)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")
        found: Document = answer.json()
        return found

    def page(self, number: int, **params: str) -> Document:
        return self.get("/job/journal", {**params, "page": number, "per_page": PER_PAGE, "sort": NEWEST})

    def cursor(self, cursor: str) -> Document:
        return self.get("/job/journal", {"cursor": cursor, "per_page": PER_PAGE, "sort": NEWEST})

    def newest(self) -> list[Document]:
        return list(self.table.find().sort("_id", -1).limit(PER_PAGE))

    def probes(self, entries: int) -> Mapping[str, Callable[[], object]]:
        """What is measured, by its name."""
        last = entries // PER_PAGE // 2  # a page in the middle
        after, middle = self.page(0)["next"], self.page(min(last, 100))["next"]
        oldest = str(self.newest()[0]["_id"])
        complete = {"state": "complete"}
        return {
            BARE: self.newest,
            "page 0": lambda: self.page(0),
            "page 100": lambda: self.page(min(last, 100)),
            "cursor, second page": lambda: self.cursor(after),
            "cursor, behind page 100": lambda: self.cursor(middle),
            "page 0 behind a filter": lambda: self.page(0, filter=FILTER),
            "total: GET job/count": lambda: self.get("/job/count"),
            "one job: GET job/<_id>": lambda: self.get(f"/job/{oldest}"),
            "bare: estimated count": self.table.estimated_document_count,
            f"bare: count up to {COUNTED:,}": lambda: self.table.count_documents(complete, limit=COUNTED + 1),
            "bare: count of all": lambda: self.table.count_documents(complete),
        }


def measured(lists: Lists, entries: int, repetitions: int) -> dict[str, Document]:
    """Medians of seconds and of processor seconds of the database, by probe; each in turn."""
    lists.here.fill(max(entries - lists.here.journaled(), 0))
    probes = lists.probes(entries)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in probes}
    refused: dict[str, str] = {}
    for _ in range(repetitions):
        for name, probe in probes.items():
            if name not in refused:
                try:
                    found[name].append(_timed(lists.here, probe))
                except (RuntimeError, requests.RequestException) as error:
                    refused[name] = str(error)
    return {name: _row(values, refused.get(name)) for name, values in found.items()}


def _timed(here: Stand, probe: Callable[[], object]) -> tuple[float, float]:
    used, start = here.clock()["db"], time.perf_counter()
    probe()
    return time.perf_counter() - start, here.clock()["db"] - used


def _row(values: list[tuple[float, float]], refused: str | None) -> Document:
    if not values:
        return {"refused": refused}
    seconds, used = (statistics.median(column) for column in zip(*values, strict=True))
    return {"ms": seconds * 1000, "db_ms": used * 1000, "n": len(values), "refused": refused}


def table(sizes: Mapping[int, Mapping[str, Document]]) -> str:
    """All of it as text; the last columns compare the large journal to the bare query and the small one."""
    first, last = sizes[min(sizes)], sizes[max(sizes)]
    head = "".join(f"{f'{size:,} ms':>16}{'db':>9}" for size in sizes)
    lines = [f"{'':32}{head}{'to bare':>9}{'to small':>10}"]
    for name in last:
        cells = "".join(_cell(sizes[size][name]) for size in sizes)
        lines.append(f"{name:32}{cells}{_ratio(last[name], last[BARE])}{_ratio(last[name], first[name], 10)}")
    lines += [f"{name}: {row['refused']}" for name, row in last.items() if row["refused"]]
    lines.append("db: ms of processor time of the database, known to 10 ms")
    return "\n".join(lines)


def _cell(row: Document) -> str:
    return f"{row['ms']:>16.1f}{row['db_ms']:>9.0f}" if "ms" in row else f"{'refused':>16}{'':9}"


def _ratio(row: Document, other: Document, width: int = 9) -> str:
    return f"{row['ms'] / other['ms']:>{width}.2f}" if "ms" in row and "ms" in other else " " * width


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.journal", description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000, help="in the journal (default: 100000)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each request (default: 5)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    with stand(0) as here:
        lists, start = Lists(here), time.monotonic()
        sizes = {size: measured(lists, size, options.repetitions) for size in (SMALL, options.entries)}
        megabytes = here.memory("db") / 2**20
        kind, seconds = here.kind, time.monotonic() - start
    print(f"{kind}, {options.repetitions} repetitions, {seconds:.0f} s; the server has {megabytes:.0f} MB")
    print(table(sizes))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"server": kind, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
