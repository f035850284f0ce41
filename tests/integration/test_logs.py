"""The log of a job: chunks in, lines out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from bson import ObjectId

from core4 import jobs
from core4.database import Database
from core4.jobs import Job, JobOrder
from core4.logs import LOG, Line, LogStore

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def logs(database: Database) -> LogStore:
    store = LogStore(database)
    await store.prepare()
    return store


def make_job() -> Job:
    document = jobs.new_document(JobOrder(name="t.Job", username="ann"), ObjectId(), jobs.utcnow())
    return Job.from_document(document)


def make_lines(count: int, start: int = 0, fence: int = 1) -> list[Line]:
    first = jobs.first_seq(fence) + start
    return [Line(first + n, 1700000000.25 + n, "INFO", f"line {start + n}") for n in range(count)]


async def test_lines_come_back_in_core4s_shape(logs: LogStore) -> None:
    """With all fields of core4.md 7."""
    job = make_job()
    error = {"info": "ValueError()", "text": ["a", "b\ud800"]}
    line = Line(jobs.first_seq(1), 1700000000.25, "CRITICAL", "nul \0 and \udcff", "stderr", error)
    await logs.append(job, "here", [line])
    (row,) = await logs.tail(job.id, 0)
    assert (
        row.items()
        >= {
            "epoch": 1700000000.25,
            "level": "CRITICAL",
            "levelno": 50,
            "message": "nul \0 and \\udcff",
            "hostname": "here",
            "username": "ann",
            "qual_name": "t.Job",
            "identifier": str(job.id),
            "seq": jobs.first_seq(1),
            "source": "stderr",
            "exception": {"info": "ValueError()", "text": ["a", "b\\ud800"]},
        }.items()
    )
    assert row["created"].timestamp() == 1700000000


async def test_an_append_can_be_repeated(logs: LogStore, database: Database) -> None:
    """A lost reply doubles nothing."""
    job = make_job()
    lines = make_lines(3)
    await logs.append(job, "here", lines)
    await logs.append(job, "here", lines)
    await logs.append(job, "here", [])
    assert await logs.count(job.id) == 3
    assert await database.collection(LOG).count_documents({}) == 1


@pytest.mark.parametrize("after", [0, 1, 4, 5, 9, 10, 24, 25])
async def test_a_tail_goes_on_behind_any_line(logs: LogStore, after: int) -> None:
    """Also from the middle of a chunk, over several attempts."""
    job = make_job()
    for start in range(0, 15, 5):
        await logs.append(job, "here", make_lines(5, start))
    await logs.append(job, "here", make_lines(10, 0, fence=2))
    every = await logs.tail(job.id, 0)
    assert len(every) == 25
    cursor = every[after - 1]["seq"] if after else 0
    assert await logs.tail(job.id, cursor) == every[after:]
    assert await logs.tail(job.id, cursor, limit=3) == every[after : after + 3]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (6, 1), (7, 2), (12, 2), (10_000, 25)])
async def test_a_tail_ends_where_its_texts_are_enough(logs: LogStore, size: int, count: int) -> None:
    job = make_job()
    await logs.append(job, "here", make_lines(25))
    assert len(await logs.tail(job.id, 0, size=size)) == count


async def test_many_chunks(logs: LogStore) -> None:
    """More chunks than are read at once."""
    job = make_job()
    for start in range(0, 300, 3):
        await logs.append(job, "here", make_lines(3, start))
    rows = await logs.tail(job.id, 0)
    assert [row["message"] for row in rows] == [f"line {n}" for n in range(300)]
    assert await logs.last_seq(job.id) == rows[-1]["seq"]


async def test_pages_cut_lines_not_chunks(logs: LogStore) -> None:
    """310 lines are 31 pages of 10, from either end."""
    job = make_job()
    for start in range(0, 310, 31):
        await logs.append(job, "here", make_lines(31, start))
    page = await logs.page(job.id, page=3)
    assert page.total == 310
    assert [row["message"] for row in page.rows] == [f"line {n}" for n in range(30, 40)]
    last = await logs.page(job.id, page=-1)
    assert [row["message"] for row in last.rows] == [f"line {n}" for n in range(300, 310)]
    newest = await logs.page(job.id, page=0, per_page=4, descending=True)
    assert [row["message"] for row in newest.rows] == [f"line {n}" for n in (309, 308, 307, 306)]
    assert (await logs.page(job.id, page=31)).rows == []
    assert (await logs.page(ObjectId())).total == 0


@pytest.mark.parametrize("descending", [False, True])
async def test_pages_of_lines_to_keep(logs: LogStore, descending: bool) -> None:
    """Each page is what it would be of a list; however many lines there are, each is looked at twice."""
    job = make_job()
    for start in range(0, 6000, 3000):
        await logs.append(job, "here", make_lines(3000, start))
    looked_at = 0

    def odd(line: Mapping[str, Any]) -> bool:
        nonlocal looked_at
        looked_at += 1
        return int(line["seq"]) % 2 == 1

    wanted = [f"line {n}" for n in range(6000) if (jobs.first_seq(1) + n) % 2 == 1]
    wanted = wanted[::-1] if descending else wanted
    for number, expected in ((0, wanted[:7]), (3, wanted[21:28]), (-1, wanted[2996:]), (429, []), (-430, [])):
        looked_at = 0
        page = await logs.page(job.id, page=number, per_page=7, descending=descending, keep=odd)
        assert (page.total, [row["message"] for row in page.rows]) == (3000, expected)
        assert looked_at <= 12_000
