"""The API as a process: what it says when it starts, when it cannot, and how it stops."""

from __future__ import annotations

import asyncio
import signal

import aiohttp

from core4.users import UserStore
from tests.helpers import BASE, FAST, Command, free_port, program
from tests.integration.driver import ADMIN, Runner, basic, order


def command(mongo_url: str, database_name: str, port: int) -> Command:
    environ = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_PORT": str(port),
    }
    return Command([program("core4"), "api"], environ)


async def test_start_and_stop(users: UserStore, runner: Runner, mongo_url: str, database_name: str) -> None:
    """Ready means that it answers; SIGTERM ends it at once, open streams or not."""
    await users.set_password(ADMIN[0], "not-the-default")
    job = await runner.queue.enqueue(order())
    port = free_port()
    with command(mongo_url, database_name, port) as api:
        api.wait_for("ready")
        url = f"http://127.0.0.1:{port}"
        headers = basic(ADMIN[0], "not-the-default")
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.get(f"{url}/readyz") as answer:
                assert answer.status == 200
            async with session.get(f"{url}{BASE}/job/follow/{job.id}") as stream:
                assert await stream.content.readline() == b"retry: 3000\n"
                api.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(api.wait, 10) == 0
    assert "Traceback" not in api.output


async def test_taken_port(users: UserStore, mongo_url: str, database_name: str) -> None:
    """One line that names the port and the remedy, exit code 1."""
    await users.set_password(ADMIN[0], "not-the-default")
    port = free_port()
    with command(mongo_url, database_name, port) as first:
        first.wait_for("ready")
        with command(mongo_url, database_name, port) as second:
            assert second.wait(30) == 1
        assert f"127.0.0.1:{port} is in use" in second.output
        assert "CORE4_PORT" in second.output
        assert "Traceback" not in second.output
        assert first.process.poll() is None


async def test_no_database() -> None:
    """One line that says so, exit code 1."""
    with command(f"mongodb://127.0.0.1:{free_port()}/", "core4", free_port()) as api:
        assert api.wait(30) == 1
    assert "Traceback" not in api.output
