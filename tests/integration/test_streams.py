"""Streams: every event once and in order, from wherever a reader stopped, until the job has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from bson import ObjectId

from core4.api import connections, hub, streams
from core4.api.keys import BASE
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job
from core4.queues import JobQueue
from core4.retries import Outcome
from core4.store import QUEUE
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import (
    ADMIN,
    Api,
    Attempt,
    Event,
    Runner,
    Stream,
    basic,
    messages,
    serving,
    states,
)

START = "start execution"


async def due(runner: Runner, job_id: ObjectId) -> None:
    """Let the time pass that a job waits for: its retry or the end of its window."""
    await runner.queue.restart(job_id, by="test")


async def run(runner: Runner, *lines: str, outcome: Outcome | None = None) -> Job:
    """One whole attempt."""
    attempt = await runner.start()
    await attempt.log(START, *lines)
    return await attempt.finish(outcome)


def check_order(events: Sequence[Event]) -> None:
    """Ids never go back, numbers only grow, and the last event is the one `close`."""
    cursors = [event.cursor for event in events]
    revs = [event.data["rev"] for event in events if event.kind == "state"]
    seqs = [event.data["seq"] for event in events if event.kind == "log"]
    assert all(later.covers(earlier) for earlier, later in pairwise(cursors))
    assert revs == sorted(set(revs))
    assert seqs == sorted(set(seqs))
    assert [event.kind for event in events].count("close") == 1
    assert events[-1].kind == "close"
    counts = {"state": len(revs), "log": len(seqs)}
    assert events[-1].data == {kind: n for kind, n in counts.items() if n}


@pytest.mark.row("S1")
@pytest.mark.parametrize("body", [{}, {"follow": True}])
async def test_enqueue_and_follow(api: Api, runner: Runner, body: dict[str, Any]) -> None:
    """POST streams by default; the id is in a header before the first event."""
    async with api.stream("/job", method="POST", json={"qual_name": "tests.Job", **body}) as stream:
        assert (await runner.queue.store.get(stream.job_id)).state == "pending"
        headers = stream.response.headers
        pending = await stream.until("state", state="pending")
        attempt = await runner.start()
        await attempt.log(START)
        running = await stream.until("log", message=START)
        for value in (0.25, 0.5, 0.75):
            await attempt.progress(value)
            running += await stream.until("state", state="running", prog={"value": value, "message": ""})
        await attempt.finish()
        events = [*pending, *running, *[event async for event in stream]]

    check_order(events)
    assert headers["Location"] == f"{BASE}/job/{stream.job_id}"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    assert stream.retry == 3000
    assert states(events) == ["pending", "running", "complete"]
    assert messages(events).count(START) == 1
    assert {event.data["_id"] for event in events if event.kind == "state"} == {str(stream.job_id)}
    assert {event.data["identifier"] for event in events if event.kind == "log"} == {str(stream.job_id)}
    assert events[0].data["name"] == "tests.Job"
    assert "qual_name" not in events[0].data
    assert events[-2].data["result"] == {"done": True}


@pytest.mark.row("S2", "S3", "S4")
async def test_three_hundred_lines(api: Api, runner: Runner) -> None:
    """All arrive once: to who follows, to who comes later, and to who comes after the end."""
    job_id = await api.enqueue()
    wanted = [START, *(f"line {n}" for n in range(300))]
    async with api.stream(f"/job/follow/{job_id}") as stream:
        attempt = await runner.start()
        await attempt.log(START)
        early = await stream.until("log", message=START)
        for start in range(0, 300, 7):
            await attempt.log(*wanted[1:][start : start + 7])
        late = asyncio.create_task(api.events(f"/job/follow/{job_id}"))
        await eventually_async(lambda: _is(api.rooms == 1), what="one room for both")
        await attempt.finish()
        live = [*early, *[event async for event in stream]]
    events = [live, await late, await api.events(f"/job/follow/{job_id}")]

    for each in events:
        check_order(each)
        assert messages(each) == wanted
        assert states(each) == ["pending", "running", "complete"]
    assert {event.data["mode"] for event in events[2] if event.kind == "log"} == {"prelog"}
    assert {event.data["mode"] for event in events[0] if event.kind == "log"} <= {"watchlog", "postlog"}
    paged = await api.call("GET", f"/job/log/{job_id}?per_page=500")
    assert [row["message"] for row in paged.data] == wanted


async def _is(value: bool) -> bool:
    return value


@pytest.mark.row("S5")
async def test_kill_while_following(api: Api, runner: Runner) -> None:
    """The stream shows the end and ends; removal succeeds once."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    async with api.stream(f"/job/follow/{job_id}") as stream:
        await stream.until("state", state="running")
        kill = asyncio.create_task(api.call("PUT", f"/job/kill/{job_id}"))
        await stream.when(lambda event: event.data.get("killed_at"))
        await attempt.finish(Outcome.killed("on request"))
        events = [event async for event in stream]
    await kill

    assert states(events) == ["killed"]
    assert events[-1].kind == "close"
    assert [(await api.call("PUT", f"/job/remove/{job_id}")).status for _ in range(2)] == [200, 404]


@pytest.mark.row("S6")
async def test_restart_and_follow(api: Api, runner: Runner) -> None:
    """The stream of the new job has the new job's lines only."""
    job_id = await api.enqueue()
    await run(runner, "old", outcome=Outcome.failed("Boom()", []))
    async with api.stream(f"/job/restart/{job_id}", method="PUT") as stream:
        assert stream.job_id != job_id
        await run(runner, "new")
        events = [event async for event in stream]

    check_order(events)
    assert messages(events) == [START, "new"]
    assert states(events)[-1] == "complete"


async def test_restart_while_the_kill_is_under_way(
    users: UserStore, runner: Runner, settings: Settings, database: Database
) -> None:
    """The new job is made when the old one has ended; who follows it waits for that."""
    async with serving(replace(settings, kill_wait=0.1), database) as api:
        job_id = await api.enqueue()
        attempt = await runner.start()
        await api.call("PUT", f"/job/kill/{job_id}")
        async with api.stream(f"/job/restart/{job_id}", method="PUT") as stream:
            assert await runner.queue.store.document(stream.job_id) is None
            await attempt.finish(Outcome.killed("on request"))
            await stream.until("state", state="pending")
            await run(runner, "new")
            events = [event async for event in stream]

    assert messages(events) == [START, "new"]
    assert events[-1].kind == "close"


@pytest.mark.row("S7")
async def test_three_attempts(api: Api, runner: Runner) -> None:
    """One stream over all attempts: two failures, then the error."""
    job_id = await api.enqueue(attempts=3)
    async with api.stream(f"/job/follow/{job_id}") as stream:
        for n in range(3):
            await run(runner, f"attempt {n}", outcome=Outcome.failed("Boom()", ["trace"]))
            if n < 2:
                await due(runner, job_id)
        events = [event async for event in stream]

    check_order(events)
    assert messages(events).count(START) == 3
    told = states(events)
    assert (told.count("failed"), told.count("error"), told[-1]) == (2, 1, "error")
    # Every line stands between the start and the end of its attempt.
    kinds = [event.data.get("message") or event.data.get("state") for event in events[:-1]]
    for n in range(3):
        line = kinds.index(f"attempt {n}")
        assert kinds[:line].count("running") >= n + 1
        assert states(events[:line]).count("failed") == n


@pytest.mark.row("S8")
async def test_always_deferring(api: Api, runner: Runner, database: Database) -> None:
    """Running, deferred and finally inactive in one stream."""
    job_id = await api.enqueue()
    async with api.stream(f"/job/follow/{job_id}") as stream:
        await run(runner, outcome=Outcome.deferred("not yet"))
        seen = await stream.until("state", state="deferred")
        # The window passes: what the clock would do.
        await database.collection(QUEUE).update_one({"_id": job_id}, {"$currentDate": {"expires": True}})
        await eventually_async(runner.queue.expire, what="the sweep")
        seen += [event async for event in stream]

    check_order(seen)
    assert states(seen) == ["pending", "running", "deferred", "inactive"]


@pytest.mark.row("S9")
async def test_deferring_twice(api: Api, runner: Runner) -> None:
    """Deferred twice, then complete."""
    job_id = await api.enqueue()
    async with api.stream(f"/job/follow/{job_id}") as stream:
        for _ in range(2):
            await run(runner, outcome=Outcome.deferred("not yet"))
            await due(runner, job_id)
        await run(runner)
        events = [event async for event in stream]

    check_order(events)
    assert states(events) == ["pending", *["running", "deferred"] * 2, "running", "complete"]


@pytest.mark.row("S10")
async def test_dividing_by_zero(api: Api, runner: Runner) -> None:
    """The error comes with its traceback."""
    job_id = await api.enqueue()
    async with api.stream(f"/job/follow/{job_id}") as stream:
        await run(runner, outcome=Outcome.failed("ZeroDivisionError()", ["line 1", "line 2"]))
        events = [event async for event in stream]

    assert states(events) == ["pending", "running", "error"]
    assert events[-2].data["last_error"]["traceback"] == ["line 1", "line 2"]


@pytest.mark.row("S14")
async def test_log_only(api: Api, runner: Runner) -> None:
    """The same without states; the counters have no states either."""
    job_id = await api.enqueue()
    async with api.stream(f"/job/log/{job_id}", json={"follow": True}) as stream:
        await run(runner, "one", "two")
        events = [event async for event in stream]

    assert [event.kind for event in events] == ["log"] * 3 + ["close"]
    assert events[-1].data == {"log": 3}
    rest = await api.events(f"/job/log/{job_id}?follow=true&last_event_id={events[0].id}")
    assert messages(rest) == ["one", "two"]


async def test_a_removed_job_ends_its_stream(api: Api, runner: Runner) -> None:
    """It will not run: nothing more can come."""
    job_id = await api.enqueue()
    async with api.stream(f"/job/follow/{job_id}") as stream:
        await stream.until("state", state="pending")
        await api.call("PUT", f"/job/remove/{job_id}")
        events = [event async for event in stream]

    assert events[0].data["removed_at"]
    assert events[-1].kind == "close"


async def whole_job(api: Api, runner: Runner) -> ObjectId:
    """A job with two attempts that has ended."""
    job_id = await api.enqueue(attempts=2)
    await run(runner, "first", outcome=Outcome.failed("Boom()", []))
    await due(runner, job_id)
    await run(runner, "second")
    return job_id


async def test_resume_from_everywhere(api: Api, runner: Runner) -> None:
    """After any event: exactly what follows it, by header as by query."""
    job_id = await whole_job(api, runner)
    path = f"/job/follow/{job_id}"
    events = await api.events(path)
    check_order(events)
    for index, event in enumerate(events[:-1]):
        by_header = await api.events(path, headers={"Last-Event-ID": event.id})
        by_query = await api.events(f"{path}?last_event_id={event.id}")
        for rest in (by_header, by_query):
            assert [(e.kind, e.id) for e in rest] == [(e.kind, e.id) for e in events[index + 1 :]]

    done = await api.call("GET", path, headers={"Last-Event-ID": events[-1].id})
    assert done.status == 204


async def test_the_journal_tells_the_same(api: Api, runner: Runner) -> None:
    """Moved, restarted and removed jobs stream as they did before."""
    job_id = await api.enqueue()
    await run(runner, "one", outcome=Outcome.failed("Boom()", []))
    before = await api.events(f"/job/follow/{job_id}")
    await api.call("PUT", f"/job/restart/{job_id}", json={"follow": False})
    assert (await api.detail(job_id))["journal"] is True
    after = await api.events(f"/job/follow/{job_id}")

    assert [(event.kind, event.id) for event in after] == [(event.kind, event.id) for event in before]
    assert (await api.call("GET", f"/job/follow/{job_id}?last_event_id={before[-1].id}")).status == 204


@pytest.mark.parametrize("cursor", ["999.0", "1.999999999999", "999.999999999999"])
async def test_cursors_from_elsewhere(api: Api, runner: Runner, cursor: str) -> None:
    """A cursor beyond what is stored hides nothing that comes, from nobody."""
    job_id = await api.enqueue()
    async with (
        api.stream(f"/job/follow/{job_id}?last_event_id={cursor}") as odd,
        api.stream(f"/job/follow/{job_id}") as even,
    ):
        await run(runner, "one")
        odd_events, even_events = [e async for e in odd], [e async for e in even]

    check_order(even_events)
    assert messages(odd_events) == messages(even_events) == [START, "one"]
    assert states(even_events) == ["pending", "running", "complete"]
    assert states(odd_events) == ["running", "complete"]


async def test_refusals_come_before_the_stream(api: Api, runner: Runner) -> None:
    """Unknown jobs, foreign methods and bad cursors are answered as errors."""
    job_id = await api.enqueue()

    assert (await api.call("GET", f"/job/follow/{ObjectId()}")).status == 404
    assert (await api.call("HEAD", f"/job/follow/{job_id}")).status == 405
    assert (await api.call("GET", f"/job/follow/{job_id}", headers={"Last-Event-ID": "x"})).status == 400
    assert api.rooms == 0


async def test_heartbeat(users: UserStore, runner: Runner, settings: Settings, database: Database) -> None:
    """A quiet stream shows that it is alive."""
    async with serving(replace(settings, sse_ping=0.05), database) as api:
        job_id = await api.enqueue()
        async with api.stream(f"/job/follow/{job_id}") as stream:
            reading = asyncio.create_task(stream.until("close"))
            await eventually_async(lambda: _is(len(stream.comments) >= 3), what="three heartbeats")
            await run(runner)
            await reading


async def test_who_leaves_is_forgotten(api: Api, runner: Runner) -> None:
    """Without an event that would have to be written."""
    job_id = await api.enqueue()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            stream = await stack.enter_async_context(api.stream(f"/job/follow/{job_id}"))
            await stream.until("state", state="pending")
        assert api.rooms == 1
    await eventually_async(lambda: _is(api.rooms == 0), what="no room is left")
    await eventually_async(
        lambda: _is(not [task for task in asyncio.all_tasks() if task.get_name().startswith("room")]),
        what="no task is left",
    )


async def test_many_followers_one_reader(api: Api, runner: Runner) -> None:
    """A hundred followers get the same, and the database is read for one."""
    job_id = await api.enqueue()
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(api.stream(f"/job/follow/{job_id}")) for _ in range(100)]
        readings = [asyncio.create_task(stream.until("close")) for stream in opened]
        await run(runner, *(f"line {n}" for n in range(50)))
        events = await asyncio.gather(*readings)

    assert api.rooms <= 1
    for each in events:
        check_order(each)
        assert len(messages(each)) == 51


async def test_a_full_page_is_encoded_once_for_all(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two hundred that encoded its own would keep all others waiting, and the page in memory."""
    pieces, made = streams._pieces, list[int]()

    def counted(frames: Sequence[Any], *args: Any, **more: Any) -> Any:
        made.append(len(frames))
        return pieces(frames, *args, **more)

    monkeypatch.setattr(streams, "_pieces", counted)
    job_id = await api.enqueue()
    attempt = await runner.start()
    await attempt.log("before")
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(api.stream(f"/job/follow/{job_id}")) for _ in range(20)]
        await asyncio.gather(*(stream.until("log", message="before") for stream in opened))
        made.clear()
        await attempt.log(*("x" * 1000 for _ in range(256)))  # see `core4.api.hub.PAGE_TEXT`
        await attempt.log("behind")
        found = await asyncio.gather(*(stream.until("log", message="behind") for stream in opened))

    assert {len(messages(each)) for each in found} == {257}
    assert sum(made) < 3 * 257, made


async def test_who_waits_is_sent_what_comes_without_being_woken(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns with whatever else there is; whoever wants the log only, and whoever leaves in between."""
    pushed, sent = hub.Follower.pushed, list[bool]()

    def counted(follower: hub.Follower) -> bool:
        sent.append(pushed(follower))
        return sent[-1]

    monkeypatch.setattr(hub.Follower, "pushed", counted)
    monkeypatch.setattr(hub, "SLICE", 1)
    job_id = await api.enqueue()
    attempt = await runner.start()
    await attempt.log("line 0")
    paths = [f"/job/follow/{job_id}", f"/job/log/{job_id}?follow=true"] * 5
    async with contextlib.AsyncExitStack() as stack:
        leaver = contextlib.AsyncExitStack()
        left = await leaver.enter_async_context(api.stream(f"/job/follow/{job_id}"))
        opened = [await stack.enter_async_context(api.stream(path)) for path in paths]
        events = [await stream.until("log", message="line 0") for stream in (*opened, left)][:-1]
        sent.clear()
        for number in range(1, 6):
            await attempt.log(f"line {number}")
            if number == 3:
                await leaver.aclose()
            for stream, found in zip(opened, events, strict=True):
                found += await stream.until("log", message=f"line {number}")
        assert sent.count(True) >= 5 * len(opened)
        await attempt.finish()
        for stream, found in zip(opened, events, strict=True):
            found += [event async for event in stream]

    for path, each in zip(paths, events, strict=True):
        check_order(each)
        assert messages(each) == [f"line {number}" for number in range(6)]
        assert bool(states(each)) is ("/log/" not in path)


async def test_one_that_cannot_be_sent_to_is_nothing_to_the_others(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, failed = streams._Sender._push, list[object]()

    def broken(sender: Any, frames: Sequence[Any]) -> bool:
        if not failed:
            failed.append(sender)
            raise RuntimeError("as told")
        return push(sender, frames)

    monkeypatch.setattr(streams._Sender, "_push", broken)
    job_id = await api.enqueue()
    attempt = await runner.start()
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(api.stream(f"/job/follow/{job_id}")) for _ in range(3)]
        found = [await stream.until("state", state="running") for stream in opened]
        await attempt.log("line")
        for stream, events in zip(opened, found, strict=True):
            events += await stream.until("log", message="line")
        await attempt.finish()
        for stream, events in zip(opened, found, strict=True):
            events += [event async for event in stream]

    assert failed
    for events in found:
        check_order(events)
        assert messages(events) == ["line"]


async def test_a_follower_beyond_the_buffer(
    users: UserStore, runner: Runner, settings: Settings, database: Database
) -> None:
    """With a tiny buffer every follower falls behind it, and still gets everything once."""
    async with serving(replace(settings, sse_buffer=1024), database) as api:
        job_id = await api.enqueue()
        async with (
            api.stream(f"/job/follow/{job_id}") as first,
            api.stream(f"/job/follow/{job_id}") as second,
        ):
            attempt = await runner.start()
            for n in range(40):
                await attempt.log(*(f"{n}/{line} {'x' * 200}" for line in range(50)))
            await attempt.finish()
            events = [[e async for e in first], [e async for e in second]]

    for each in events:
        check_order(each)
        assert len(messages(each)) == 2000


async def test_a_stalled_follower_is_cut(
    users: UserStore,
    runner: Runner,
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who takes nothing is cut, holds up nobody, and can go on where he stopped."""
    monkeypatch.setattr(connections, "STALLED", 0.3)
    monkeypatch.setattr(connections, "LOOK", 0.1)
    async with serving(settings, database) as api:
        job_id = await api.enqueue()
        # A small window, so that the kernel does not take the whole log for him.
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(peer, ("127.0.0.1", api.port))
        await loop.sock_sendall(peer, request_bytes(job_id))
        assert b"200 OK" in await loop.sock_recv(peer, 100)
        attempt = await runner.start()
        for n in range(60):
            await attempt.log(*(f"{n} {'x' * 1000}" for _ in range(100)))
        await eventually_async(lambda: _is(api.rooms == 0), 30, what="the follower is cut")
        peer.close()
        await attempt.finish()
        events = await api.events(f"/job/follow/{job_id}")

    check_order(events)
    assert len(messages(events)) == 6000


async def test_shutdown_cuts_streams(
    users: UserStore, runner: Runner, settings: Settings, database: Database
) -> None:
    """No `close`: the reader comes back, at another process, where he stopped."""
    async with serving(settings, database) as other, contextlib.AsyncExitStack() as leaving:
        job_id = await other.enqueue()
        attempt = await runner.start()
        api = await leaving.enter_async_context(serving(settings, database))
        url = api.url(f"/job/follow/{job_id}")
        async with other.session.get(url, headers=basic(*ADMIN)) as response:
            stream = Stream(response)
            await attempt.log("one")
            seen = await stream.until("log", message="one")
            await leaving.aclose()
            with pytest.raises(aiohttp.ClientError):
                seen += [event async for event in stream]
        await attempt.log("two")
        await attempt.finish()
        seen += await other.events(f"/job/follow/{job_id}", headers={"Last-Event-ID": seen[-1].id})

    assert messages(seen) == ["one", "two"]
    assert [event.kind for event in seen].count("close") == 1


async def test_http_1_0(api: Api, runner: Runner) -> None:
    """A client of the older protocol gets the bytes as they are, until the connection ends."""
    job_id = await api.enqueue()
    await run(runner, "one")
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(request_bytes(job_id).replace(b"HTTP/1.1", b"HTTP/1.0"))
    text = await reader.read()
    writer.close()

    assert b"\r\n\r\nretry: 3000\n\n" in text
    assert text.endswith(b'event: close\ndata: {"state":3,"log":2}\n\n')


async def test_hostile_lines(api: Api, runner: Runner) -> None:
    """No text of a job can end its event, forge another or break the JSON."""
    hostile = [
        "\r\n\r\nevent: close\r\ndata: {}\r\n\r\n",
        "\u2028\u2029\x85",
        "\0\x1b[2J",
        "data: x\n\nid: 9.9\n",
        '"}\n',
    ]
    job_id = await api.enqueue()
    await run(runner, *hostile)
    events = await api.events(f"/job/follow/{job_id}")

    check_order(events)
    assert messages(events) == [START, *hostile]


def request_bytes(job_id: ObjectId, last_id: str | None = None) -> bytes:
    """A follow request as it goes over the wire."""
    headers = {"Host": "localhost", **basic(*ADMIN)}
    if last_id:
        headers["Last-Event-ID"] = last_id
    lines = [f"GET {BASE}/job/follow/{job_id} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


class CutFollower:
    """Follows with a raw socket that is reset in the middle of frames, at any of several processes."""

    def __init__(self, job_id: ObjectId, ports: list[int], seed: int) -> None:
        self._job_id, self._ports, self._random = job_id, ports, random.Random(seed)
        self.cuts = self.half_frames = 0
        self.events: list[Event] = []
        self.done = False

    async def follow(self, cuts: int) -> None:
        """Until `close`; the first `cuts` connections are reset after a random number of bytes."""
        while not self.done:
            budget = self._random.randrange(100, 60_000) if self.cuts < cuts else None
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._connect(budget)

    async def _connect(self, budget: int | None) -> None:
        port = self._random.choice(self._ports)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request_bytes(self._job_id, self.events[-1].id if self.events else None))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n")[0], head
            await self._read(reader, writer, budget)
        finally:
            writer.transport.abort()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        buffer, taken = b"", 0
        while not self.done:
            size = int(await reader.readuntil(b"\r\n"), 16)
            if not size:
                return
            chunk = (await reader.readexactly(size + 2))[:-2]
            if budget is not None and taken + len(chunk) > budget:
                chunk = chunk[: budget - taken]
                self._take(buffer + chunk)
                self.cuts += 1
                self.half_frames += not (buffer + chunk).endswith(b"\n\n")
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                raise ConnectionResetError
            taken += len(chunk)
            buffer = self._take(buffer + chunk)

    def _take(self, buffer: bytes) -> bytes:
        *frames, rest = buffer.split(b"\n\n")
        for frame in frames:
            fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if ": " in line)
            if "event" in fields:
                self.events.append(Event(fields["event"], fields["id"], json.loads(fields["data"])))
                self.done = self.done or fields["event"] == "close"
        return rest


@pytest.mark.timeout(300)
async def test_followers_cut_two_hundred_times(
    users: UserStore, runner: Runner, settings: Settings, database: Database, queue: JobQueue
) -> None:
    """10,000 lines and 3 retries while ten followers are reset 200 times at two processes, one of which
    goes away: each gets what is stored, in order, once, with every transition and one `close`."""
    followers_count, cuts = 10, 20
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(settings, database))
        leaving = contextlib.AsyncExitStack()
        two = await leaving.enter_async_context(serving(settings, database))
        job_id = await one.enqueue(attempts=4)
        ports = [one.port, two.port]
        followers = [CutFollower(job_id, ports, seed) for seed in range(followers_count)]
        readings = [asyncio.create_task(follower.follow(cuts)) for follower in followers]
        for attempt_number in range(4):
            attempt = await runner.start()
            await _write_lines(attempt, 2500)
            if attempt_number == 1:
                ports.remove(two.port)
                await leaving.aclose()
            # The next attempt waits until a share of the cuts has happened.
            share = followers_count * cuts * (attempt_number + 1) // 4
            await eventually_async(
                lambda share=share: _is(sum(f.cuts for f in followers) >= share),  # type: ignore[misc]
                120,
                what=f"{share} cuts",
            )
            last = attempt_number == 3
            await attempt.finish(None if last else Outcome.failed("Boom()", []))
            if not last:
                await due(runner, job_id)
        await asyncio.wait_for(asyncio.gather(*readings), 120)
        await eventually_async(lambda: _is(one.rooms == 0), what="nobody is left")

    found = await queue.store.document(job_id)
    assert found is not None
    stored = [line["seq"] for line in await runner.logs.tail(job_id, 0, limit=20_000)]
    history = [(entry["rev"], entry["state"]) for entry in found[0]["history"]]
    assert len(stored) == 10_000
    assert sum(follower.cuts for follower in followers) == followers_count * cuts
    assert sum(follower.half_frames for follower in followers) > followers_count
    for follower in followers:
        revs = [e.data["rev"] for e in follower.events if e.kind == "state"]
        told = [(e.data["rev"], e.data["state"]) for e in follower.events if e.kind == "state"]
        assert [e.data["seq"] for e in follower.events if e.kind == "log"] == stored
        assert revs == sorted(set(revs))
        assert [state for state in told if state in history] == history
        assert [e.kind for e in follower.events].count("close") == 1
        assert follower.events[-1].kind == "close"


async def _write_lines(attempt: Attempt, count: int) -> None:
    for start in range(0, count, 50):
        await attempt.log(*(f"line {start + n} of attempt {attempt.job.fence}" for n in range(50)))
        if start % 500 == 0:
            await attempt.progress(start / count)
