"""Whatever a client sends: the exact status, one body for all errors, and nothing happens."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import string
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
from bson import ObjectId

from core4.api import arguments, connections
from core4.api.keys import BASE
from core4.config import Settings
from core4.database import Database
from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner, basic, serving

SEED = 20260131
NOBODIES = int(IPv4Address("10.0.0.1"))
_visitors = count()
MEMBERS = {
    *("_id", "version", "timestamp", "message", "code", "error"),
    *("type", "title", "status", "detail", "instance"),
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "text": {"type": "string"}, "any": {}},
    "additionalProperties": False,
}


@dataclass
class Bad:
    """One request with something wrong, and the status it must get."""

    status: int
    method: str = "GET"
    path: str = "/job"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the whole request, where it is not even HTTP


def body_of(value: Any) -> bytes:
    # NaN and infinities as Python writes them: other clients do, too.
    return json.dumps(value).encode()


def post(status: int, body: bytes, path: str = "/job", **headers: str) -> Bad:
    head = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return Bad(status, "POST", path, body, head)


def order(r: random.Random, status: int, **wrong: Any) -> Bad:
    """A good order but for what is `wrong`."""
    good: dict[str, Any] = {"qual_name": "tests.Strict", "args": {"n": r.randrange(1000)}, "follow": False}
    return post(status, body_of({**good, **wrong}))


def listing(r: random.Random, **wrong: Any) -> Bad:
    """A listing with one bad argument, in the query or in a body."""
    path = r.choice(["/job", "/job/queue", "/job/journal"])
    if r.random() < 0.5:
        text = "&".join(
            f"{name}={quote(value if isinstance(value, str) else json.dumps(value), errors='surrogatepass')}"
            for name, value in wrong.items()
        )
        return Bad(400, "GET", f"{path}?{text}")
    return Bad(400, "GET", path, body_of(wrong), {"Content-Type": "application/json"})


def word(r: random.Random, alphabet: str = string.ascii_letters, most: int = 20) -> str:
    return "".join(r.choice(alphabet) for _ in range(r.randrange(1, most)))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def deep_text(r: random.Random) -> bytes:
    depth = r.randrange(20_000, 100_000)
    return r.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])


def broken_json(r: random.Random) -> bytes:
    whole = body_of({"qual_name": "tests.Strict", "args": {"n": 1}, "follow": False})
    return whole[: r.randrange(1, len(whole))]


def no_object(r: random.Random) -> bytes:
    return body_of(r.choice([[], [1], "text", 5, 1.5, True, None, ["qual_name"]]))


def not_utf8(r: random.Random) -> bytes:
    return b'{"qual_name": "' + bytes(r.choice([0xFF, 0xC0, 0x80]) for _ in range(3)) + b'"}'


def bad_id(r: random.Random) -> str:
    return r.choice(
        [str(ObjectId()), word(r), "%00", "%ff%fe", "..%2f", "0" * 23, "g" * 24, "a" * 300, "$ne", "[object]"]
    )


def actions(r: random.Random) -> Bad:
    method, path = r.choice(
        [
            *(("GET", "/job/"), ("GET", "/job/detail/"), ("GET", "/job/follow/"), ("GET", "/job/log/")),
            *(("PUT", "/job/kill/"), ("PUT", "/job/remove/"), ("PUT", "/job/restart/")),
        ]
    )
    return Bad(404, method, path + bad_id(r))


BAD_ARGS: list[Callable[[random.Random], Any]] = [
    lambda r: {"n": word(r)},
    lambda r: {"n": 1.5},
    lambda r: {"text": r.randrange(10)},
    lambda r: {word(r, string.ascii_lowercase) + "_": 1},
    lambda r: {"any": 2 ** r.randrange(63, 200)},
    lambda r: {"any": nested(r.randrange(32, 90))},
    lambda r: {"text": "\ud800" + word(r)},
    lambda r: {"any": {"a\0": 1}},
    lambda r: {"any": {r.choice(["$where", "$ref", "$id"]): "x"}},
    lambda r: {"priority": r.choice(["high", 1001, 1.5, None])},
    lambda r: {"attempts": r.choice([0, -1, "many"])},
]
BAD_FILTERS: list[Any] = [
    *({"$where": "sleep(1000)"}, {"$or": [{}]}, {"$expr": {}}, {"lease.id": "x"}, {"password": "x"}),
    *({"state": "bogus"}, {"state": {"$regex": "^(a+)+$"}}, {"state": {"$ne": {"$gt": ""}}}, {"state": []}),
    *({"args.$where": 1}, {"args.a": {"$function": {}}}, {"args": {}}, {"args.a": nested(100)}),
    *({"_id": "nope"}, {"_id": {"$in": "x"}}, {"enqueued.at": "soon"}, {"priority": 2**70}),
    *(
        {"runtime": float("nan")},
        {"args.a": "\ud800"},
        {"args.a\0": 1},
        {"": 1},
        {"args.a": {"in": [1] * 101}},
    ),
    *([], "x", 5, "{", [["a"]]),
]
BAD_SORTS: list[Any] = [
    [["_id"]],
    ["_id"],
    [["$natural", 1]],
    [["_id", 2]],
    [[{}, 1]],
    {},
    "x",
    5,
    [["args.a", 1]],
]

AS_ADMIN: list[Callable[[random.Random], Bad]] = [
    lambda r: post(400, broken_json(r)),
    lambda r: post(400, no_object(r)),
    lambda r: post(400, not_utf8(r)),
    lambda r: post(400, deep_text(r)),
    lambda r: post(400, b'{"qual_name": ' + b"9" * r.randrange(5000, 9000) + b"}"),
    lambda r: post(413, body_of({"qual_name": "tests.Strict", "args": {"text": "x" * (1 << 20)}})),
    lambda r: order(r, 413, args={"text": "x" * (300 << 10)}),
    lambda r: Bad(
        415,
        "POST",
        "/job",
        body_of({"qual_name": "tests.Strict"}),
        {"Content-Type": r.choice(["text/plain", "application/x-www-form-urlencoded", "a/b;c", "json", ";"])},
    ),
    lambda r: post(
        415, b"{}", Content_Type="application/json; charset=" + r.choice(["utf-16", "x", "latin1"])
    ),
    lambda r: post(415, b"\x1f\x8b", Content_Encoding=r.choice(["gzip", "deflate", "br", "x"])),
    lambda r: order(r, 400, **{word(r) + "_": 1}),
    lambda r: order(r, 400, qual_name=r.choice([5, None, [], {}, "", "a\0b", "\ud800", "a" * 201, "a\nb"])),
    lambda r: order(r, 404, qual_name=word(r, string.printable[:94], 100) + ".Nope"),
    lambda r: order(r, 400, args=r.choice([5, "x", [], "[1]", True])),
    lambda r: order(r, 422, args=r.choice(BAD_ARGS)(r)),
    lambda r: order(r, 400, args={"any": r.choice([float("nan"), float("inf"), float("-inf")])}),
    lambda r: order(r, 400, args={"any": nested(r.randrange(100, 500))}),
    lambda r: order(r, 400, follow=r.choice(["maybe", 7, [], None, {}])),
    lambda r: order(r, 400, namespace=r.choice(["", "a b", "a/b", 5, None, "ä", "x" * 101])),
    lambda r: order(r, 400, priority=r.choice(["high", 1001, -1001, 1.5, None, [], 2**80])),
    lambda r: order(r, 400, attempts=r.choice([0, "0", 10_001, None, {}])),
    lambda r: order(r, 400, wall_time=r.choice([0, -1, "x", float("nan"), float("inf"), 1e300])),
    lambda r: order(r, 400, timeout=r.choice([0, -1, "x", "1s", True, [], 1e300])),
    lambda r: order(r, 400, memory_limit=r.choice([0, 1.5, "much", "9 PB", "-1GB", {}, "1" * 400, 2**80])),
    lambda r: order(r, 400, jitter=r.choice([-0.1, 2, "x", None, float("nan")])),
    lambda r: order(r, 400, backoff=r.choice([0, 0.99, 101, "x", None, []])),
    lambda r: order(r, 400, wall_action=r.choice(["stop", "", 5, None, ["kill"], {}])),
    lambda r: order(r, 400, worker=r.choice(["", 5, "a\nb", "x" * 201])),
    lambda r: listing(r, page=r.choice(["one", "1.5", "", 2**40, "9" * 30, "\0", "0x1"])),
    lambda r: listing(r, per_page=r.choice([0, -1, 501, "many", 2**63, "1e3"])),
    lambda r: listing(r, filter=r.choice(BAD_FILTERS)),
    lambda r: listing(r, sort=r.choice(BAD_SORTS)),
    lambda r: listing(r, search=r.choice(["a" * 201, "a*b*c*d*e", "?" * 11, "a\0b"])),
    lambda r: listing(r, **{word(r) + "_": "x"}),
    lambda r: Bad(400, "GET", f"/job?page=%{r.choice(['zz', 'f', '', 'u0041'])}"),
    actions,
    lambda r: Bad(405, r.choice(["DELETE", "PATCH", "PUT"]), "/job"),
    lambda r: Bad(405, r.choice(["GET", "POST", "DELETE"]), f"/job/kill/{ObjectId()}"),
    lambda r: Bad(405, r.choice(["PUT", "POST", "GET"]), f"/job/{word(r)}_/{ObjectId()}"),
    lambda r: Bad(404, r.choice(["GET", "POST", "PUT"]), f"/{word(r)}_"),
    lambda r: Bad(
        400, "GET", "/job/follow/{job}", headers={"Last-Event-ID": r.choice(["x", "1", "1.2.3", "-1.0"])}
    ),
    lambda r: Bad(400, "GET", f"/job/follow/{{job}}?last_event_id={word(r)}"),
    lambda r: Bad(403, "PUT", f"/job/kill/{ObjectId()}", headers={"Origin": f"http://{word(r)}.example"}),
    lambda r: Bad(417, "POST", "/job", b"", {"Expect": word(r)}),
]

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
AS_NOBODY: list[Callable[[random.Random], Bad]] = [
    lambda r: Bad(401, r.choice(["GET", "POST"]), r.choice(["/job", "/job/queue", "/job/list"])),
    lambda r: Bad(401, "GET", f"/job/{r.choice(['follow', 'log', 'detail'])}/{bad_id(r)}"),
    lambda r: Bad(401, "GET", "/job", headers=basic(word(r) + str(r.random()), word(r))),
    lambda r: Bad(401, "GET", "/job", headers=basic(f"x{r.random()}\0", "a\0b")),
    lambda r: Bad(401, "GET", "/job", headers={"Authorization": f"Basic {word(r)}!"}),
    lambda r: Bad(401, "GET", "/job", headers={"Authorization": "Basic " + b64encode(b"\xff\xfe").decode()}),
    lambda r: Bad(401, "GET", "/job", headers={"Authorization": f"Bearer {word(r, string.printable[:94])}"}),
    lambda r: Bad(401, "GET", "/job", headers={"Authorization": f"{word(r)} x"}),
    lambda r: Bad(401, "GET", "/job", headers={"Cookie": f"token={word(r)}"}),
    lambda r: Bad(401, "GET", f"/job/follow/x?ticket={word(r)}"),
    lambda r: Bad(401, "GET", "/job?username=admin&password=hans"),
    lambda r: post(401, broken_json(r)),
    lambda r: post(401, body_of({"username": word(r) + str(r.random()), "password": word(r)}), "/login"),
    lambda r: post(
        400, body_of({"username": r.choice([5, None, {"$ne": ""}, []]), "password": "x"}), "/login"
    ),
    lambda r: post(400, broken_json(r), "/login"),
    lambda r: Bad(404, "GET", f"/{word(r)}_"),
    lambda r: Bad(400, raw=bytes(r.randrange(1, 255) for _ in range(40)) + b"\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"Content-Length: " + word(r).encode() + b"\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"Content-Length: -%d\r\n\r\n" % r.randrange(1, 9)),
    lambda r: Bad(400, raw=HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"no header\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"X: a\0b\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"X: " + b"a" * r.randrange(8200, 20_000) + b"\r\n\r\n"),
    lambda r: Bad(400, raw=HEAD + b"X: a\r\n" * 200 + b"\r\n"),
    lambda r: Bad(400, raw=b"GET /" + b"a" * r.randrange(8200, 20_000) + b" HTTP/1.1\r\n\r\n"),
    lambda r: Bad(400, raw=b"GET / HTTP/%d.%d\r\n\r\n" % (r.randrange(2, 10), r.randrange(2, 10))),
    lambda r: Bad(400, raw=word(r, string.ascii_uppercase).encode() + b"Q / HTTP/1.1\r\nHost: a\r\n\r\n"),
]


async def exchange(port: int, raw: bytes) -> tuple[int, Mapping[str, str], bytes]:
    """Send bytes, read one answer: status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status = int(head.split(" ", 2)[1])
            pairs = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in pairs}
            return status, headers, await reader.readexactly(int(headers.get("content-length", 0)))
    finally:
        writer.transport.abort()


def written(bad: Bad, job_id: ObjectId, *, admin: bool) -> bytes:
    """The bytes of a request."""
    if bad.raw is not None:
        return bad.raw
    headers = {"Host": "localhost", **(basic(*ADMIN) if admin else {}), **bad.headers}
    if not admin:
        headers["X-Forwarded-For"] = str(IPv4Address(NOBODIES + next(_visitors)))
    if bad.body:
        headers["Content-Length"] = str(len(bad.body))
    lines = [f"{bad.method} {BASE}{bad.path.replace('{job}', str(job_id))} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + bad.body


def complaints(status: int, headers: Mapping[str, str], body: bytes) -> list[str]:
    """What is wrong with the body of an error."""
    problem = json.loads(body)
    found = [f"no member {name}" for name in MEMBERS - problem.keys()]
    if not headers["content-type"].startswith("application/problem+json"):
        found.append(headers["content-type"])
    if not problem["status"] == problem["code"] == status:
        found.append("other status in the body")
    if not re.fullmatch(r"urn:core4:problem:[a-z_]+", problem["type"]):
        found.append(problem["type"])
    if not problem["detail"] or "Traceback" in body.decode() or ".py" in problem["detail"]:
        found.append(problem["detail"])
    if status == 422 and not all({"pointer", "message"} <= error.keys() for error in problem["errors"]):
        found.append("no pointers")
    return found


@pytest.fixture
async def proxied(settings: Settings, database: Database, users: UserStore) -> AsyncIterator[Api]:
    """An API that believes who the requests come from: none of them guesses too often."""
    async with serving(replace(settings, trusted_proxies=("127.0.0.1/32",)), database) as api:
        yield api


@pytest.mark.timeout(300)
async def test_two_thousand_malformed_requests(
    proxied: Api, runner: Runner, users: UserStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Half as administrator on a valid route with one thing wrong, half as anybody: exact status, valid
    body, nothing queued, nothing logged as our mistake, and a good request works afterwards."""
    api = proxied
    caplog.set_level(logging.INFO)
    await runner.publish("tests.Strict", schema=SCHEMA)
    job_id = await api.enqueue()
    r = random.Random(SEED)
    seen: Counter[int] = Counter()
    failures: list[str] = []

    async def one(bad: Bad, *, admin: bool) -> None:
        raw = written(bad, job_id, admin=admin)
        try:
            status, headers, body = await exchange(api.port, raw)
            seen[status] += 1
            wrong = [] if status == bad.status else [f"status {status}, not {bad.status}"]
            wrong += complaints(status, headers, body) if status >= 400 else []
        except Exception as error:  # the request is shown with what went wrong
            wrong = [repr(error)]
        if wrong:
            failures.append(f"{raw[:300]!r} {raw[-200:]!r}: {wrong}")

    for start in range(0, 1000, 20):
        await asyncio.gather(
            *(one(AS_ADMIN[n % len(AS_ADMIN)](r), admin=True) for n in range(start, start + 20)),
            *(one(AS_NOBODY[n % len(AS_NOBODY)](r), admin=False) for n in range(start, start + 20)),
        )

    assert not failures, f"{len(failures)} of 2000\n" + "\n".join(failures[:20])
    assert sum(seen.values()) == 2000
    assert max(seen) < 500
    assert await runner.queue.store.counts() == {"pending": 1}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    good = await api.call(
        "POST", "/job", json={"qual_name": "tests.Strict", "args": {"n": 1}, "follow": False}
    )
    assert good.status == 200


@pytest.mark.row("S19")
@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        ("POST", "/job", "Missing argument qual_name"),
        ("GET", "/job?page=one", "parameter [page] expected as_type [int]"),
        ("GET", "/job?filter=x", "parameter [filter] expected as_type [dict]"),
        ("GET", "/job?sort=x", "parameter [sort] expected as_type [list]"),
        ("GET", "/job?nonsense=1", "unknown argument [nonsense]"),
    ],
)
async def test_texts(api: Api, method: str, path: str, text: str) -> None:
    """core4's texts say which argument is missing or of the wrong type."""
    answer = await api.call(method, path)

    assert answer.status == 400
    assert text in answer.body["error"]
    assert answer.body["message"] == "Bad Request"


async def test_follow_is_accepted_where_core4_ignores_it(api: Api, runner: Runner) -> None:
    """`job/follow` takes the argument that the document's snippet sends."""
    job_id = await api.enqueue()
    await (await runner.start()).finish()

    events = await api.events(f"/job/follow/{job_id}", json={"follow": True})
    assert events[-1].kind == "close"


async def test_a_body_that_does_not_come(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever announces more than he sends does not hold the connection for ever."""
    monkeypatch.setattr(arguments, "BODY_TIME", 0.2)
    raw = written(Bad(408, "POST", headers={"Content-Length": "10"}), ObjectId(), admin=True)

    status, headers, body = await exchange(api.port, raw)

    assert status == 408
    assert complaints(status, headers, body) == []


async def test_a_head_that_does_not_come(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and never asks is cut; who has asked once may ask again later."""
    monkeypatch.setattr(connections, "HEAD_TIME", 0.5)
    whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    silent, slow, asking = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(3)]
    slow[1].write(whole[:30])
    asking[1].write(whole)
    assert (await asking[0].readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")

    async with asyncio.timeout(10):
        assert await silent[0].read() == b""
        assert await slow[0].read() == b""
    asking[1].write(whole)
    assert b"HTTP/1.1 200 " in await asking[0].readuntil(b"\r\n\r\n")
    for _, writer in (silent, slow, asking):
        writer.close()


async def test_outage(api: Api, users: UserStore, settings: Settings, database: Database) -> None:
    """While the database does not answer: 503 with Retry-After; the probe says so, the process is alive."""
    gone = await Database.connect(str(settings.mongo_url), database.name)
    async with serving(replace(settings, token_ttl=60.0), gone) as cut:
        assert (await cut.call("GET", "/job")).status == 200
        await gone.close()
        answers = [
            await cut.call("GET", "/job"),
            await cut.call("POST", "/job", json={"qual_name": "tests.Job", "follow": False}),
            await cut.call("GET", "readyz", auth=None),
        ]
        alive = await cut.call("GET", "livez", auth=None)

    assert [answer.status for answer in answers] == [503] * 3
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    assert all(answer.body["type"] == "urn:core4:problem:unavailable" for answer in answers)
    assert alive.status == 200
