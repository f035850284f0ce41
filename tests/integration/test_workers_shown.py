"""`core4 workers` at a terminal and in a script, on a running API."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess

import pytest

from core4.controls import ControlStore
from core4.database import Database
from core4.jobs import Kind, Owner
from core4.registry import WorkerRegistry
from tests.helpers import clean_environ, program
from tests.integration.driver import ADMIN, Api, Runner

pytestmark = pytest.mark.asyncio


def environ(api: Api) -> dict[str, str]:
    return clean_environ(
        CORE4_URL=api.root, CORE4_USER=ADMIN[0], CORE4_PASSWORD=ADMIN[1], TERM="xterm", COLUMNS="200"
    )


async def core4(api: Api, *words: str) -> str:
    """What the installed program prints."""
    done = await asyncio.to_thread(
        subprocess.run, [program("core4"), *words], env=environ(api), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def look(terminal: int, *words: str) -> str:
    """What a terminal shows up to the last of these words."""
    seen = ""
    while not all(word in seen for word in words):
        seen += os.read(terminal, 10_000).decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)


@pytest.mark.row("M35")
async def test_the_table_lives(api: Api, runner: Runner) -> None:
    """It shows what changes until Ctrl-C."""
    await api.enqueue()
    master, slave = pty.openpty()
    shown = subprocess.Popen(
        [program("core4"), "workers", "--every", "0.2"],
        env=environ(api),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        first = await asyncio.wait_for(asyncio.to_thread(look, master, "w1", "Ctrl-C"), 60)
        await runner.start()
        await runner.registry.beat(runner.owner, running=1)  # else it is silent, and an ERROR
        await asyncio.wait_for(asyncio.to_thread(look, master, "BUSY"), 60)
        shown.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(shown.wait, 60)
    finally:
        shown.kill()
        shown.wait()
        os.close(master)

    assert "runner@here" in first
    assert code == 0


async def test_scripts_get_it_once_and_end_one(
    api: Api, runner: Runner, registry: WorkerRegistry, database: Database
) -> None:
    await registry.enlist(Owner("other", "worker@there", "there", 7, Kind(nr=5)))
    rows = json.loads(await core4(api, "workers", "-o", "json"))
    table = await core4(api, "workers", "--once")
    await core4(api, "workers", "halt", "w1", "--reason", "move")
    await core4(api, "workers", "stop", "other")
    stops = {stop.owner: stop for stop in (await ControlStore(database).read()).stops}

    assert [(row["label"], row["state"]) for row in rows] == [("w5", "new"), ("w1", "up")]
    assert "runner@here" in table
    assert (stops[runner.owner.id].hard, stops[runner.owner.id].reason) == (False, "move")
    assert stops["other"].hard
