"""Who asks and does not read what is answered: he is cut, and holds up nobody."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from core4.api import connections
from core4.api.app import LARGE
from core4.api.keys import BASE, TURNS
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import ADMIN, Answer, Api, basic

BUNDLE = "/static/swagger-ui-5.35.0/swagger-ui-bundle.js"
MANY = 8  # answers one after the other: the kernel takes some megabytes of them, whoever reads


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not read for a second is cut."""
    monkeypatch.setattr(connections, "STALLED", 1.0)


@pytest.fixture(autouse=True)
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections are looked at often."""
    monkeypatch.setattr(connections, "LOOK", 0.1)


def asked(path: str, *more: str) -> bytes:
    """A request of the administrator."""
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *more]
    lines += [f"{name}: {value}" for name, value in basic(*ADMIN).items()]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def lazy(port: int) -> Iterator[socket.socket]:
    """A connection into which the kernel takes next to nothing."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", port))
        peer.setblocking(False)
        yield peer


async def read(peer: socket.socket, *, pause: float = 0.0) -> bytes:
    """All that comes until the end of the connection, 32 KB at a time."""
    loop, found = asyncio.get_running_loop(), bytearray()
    try:
        while part := await loop.sock_recv(peer, 32_768):
            found += part
            await asyncio.sleep(pause)
    except ConnectionError:
        pass
    return bytes(found)


async def test_answers_that_are_not_read(api: Api, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    """The connection ends, and the log says so."""
    async with api.session.get(api.root + BUNDLE) as answer:
        size = len(await answer.read())
    with lazy(api.port) as peer:
        await asyncio.get_running_loop().sock_sendall(peer, asked(BUNDLE) * MANY)

        async def cut() -> bool:
            return "connections.stalled" in caplog.messages

        await eventually_async(cut, 30, what="who does not read is cut")
        async with asyncio.timeout(30):
            got = await read(peer)
    assert 0 < len(got) < size * MANY


async def test_who_reads_slowly_gets_all(api: Api, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than who does not read may stay."""
    with lazy(api.port) as peer:
        requests = asked(BUNDLE) * (MANY - 1) + asked(BUNDLE, "Connection: close")
        await asyncio.get_running_loop().sock_sendall(peer, requests)
        got = await read(peer, pause=0.001)
    async with api.session.get(api.root + BUNDLE) as whole:
        assert got.count(await whole.read()) == MANY
    assert "connections.stalled" not in caplog.messages


async def test_who_reads_nothing_gets_no_more_to_hold(
    api: Api, users: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many large answers of one user are under way: his next ones wait, those of others do not."""
    await users.add("bob", "secret", ["cop"])
    for number in range(8):
        await api.enqueue(number=number, text="x" * 200_000)
    path, loop = "/job?per_page=100", asyncio.get_running_loop()
    with ExitStack() as peers:
        for _ in range(LARGE):
            await loop.sock_sendall(peers.enter_context(lazy(api.port)), asked(BASE + path) * MANY)

        async def stuck() -> asyncio.Task[Answer] | None:
            """A request that came first, and is not answered after three of somebody else's."""
            own = asyncio.create_task(api.call("GET", path))
            for _ in range(3):
                assert len((await api.call("GET", path, auth=("bob", "secret"))).data) == 8
            return None if own.done() else own

        own = await eventually_async(stuck, what="all turns are taken")
        assert own is not None
        assert api.app[TURNS].of(ADMIN[0]).locked()
        assert (await api.call("GET", "/profile")).status == 200  # only what may be large waits
        monkeypatch.setattr(connections, "STALLED", 0.3)
        assert len((await own).data) == 8
