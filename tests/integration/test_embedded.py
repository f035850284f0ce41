"""The embedded database: private, alone on its folder, and back with its data after any end."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient, WriteConcern

from core4.config import Settings
from core4.embedded import (
    STATE_FILE,
    EmbeddedServer,
    FolderInUse,
    NoServer,
    database_url,
    find_server,
    frees_keys,
    running,
)
from core4.errors import ConfigError
from tests.helpers import eventually, port_is_free

# Starts a server, says so, and waits for its end: what the tests kill.
HOLDER = """
import sys
from pathlib import Path
from core4.embedded import EmbeddedServer

server = EmbeddedServer(Path(sys.argv[1]))
print(server.start(), flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs a server on the folder `home`; its first line is the URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "home")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def client_of(url: str) -> MongoClient[dict[str, Any]]:
    return MongoClient(url, serverSelectionTimeoutMS=5000)


def test_starts_answers_and_stops(tmp_path: Path) -> None:
    """A started server answers, is found by its state file, and leaves neither process nor state."""
    with EmbeddedServer(tmp_path / "home") as server:
        with client_of(server.url) as client:
            assert client.admin.command("ping")["ok"] == 1
        state = running(server.home)
        assert state is not None
        assert state.url == server.url
        process = psutil.Process(state.pid)

    assert not process.is_running()
    assert running(server.home) is None
    assert not (server.home / STATE_FILE).exists()
    assert port_is_free(state.port)


def test_is_private(tmp_path: Path) -> None:
    """It listens on loopback only, and no other user reads its files."""
    with EmbeddedServer(tmp_path / "home") as server:
        state = running(server.home)
        assert state is not None
        listening = [
            each.laddr.ip
            for each in psutil.Process(state.pid).net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        ]
        modes = {
            path: stat.S_IMODE(path.stat().st_mode)
            for path in (server.home, server.home / "database", *server.home.glob("embedded.*"))
        }

    assert listening == ["127.0.0.1"]
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_data_is_there_after_stop_and_start(tmp_path: Path) -> None:
    """A stop and a new start keep what was written."""
    server = EmbeddedServer(tmp_path / "home")
    with server, client_of(server.url) as client:
        client.db.things.insert_one({"_id": 1})
    with server, client_of(server.url) as client:
        assert client.db.things.find_one() == {"_id": 1}


def test_dies_with_its_parent_and_comes_back_with_its_data(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    """kill -9 of the parent ends the server; the next start finds every acknowledged durable write."""
    home = tmp_path / "home"
    url = first_line(holder)
    state = running(home)
    assert state is not None
    server = psutil.Process(state.pid)
    with client_of(url) as client:
        durable = WriteConcern(w="majority", j=True)
        things = client.get_database("db").get_collection("things", write_concern=durable)
        for number in range(50):
            things.insert_one({"_id": number})
        holder.kill()
        eventually(lambda: not server.is_running(), what="the server is gone")

    assert running(home) is None
    with EmbeddedServer(home) as again, client_of(again.url) as client:
        assert client.db.things.count_documents({}) == 50


def test_folder_in_use_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """A second server on the same folder is refused with the process that holds it; the first goes on."""
    url = first_line(holder)
    state = running(tmp_path / "home")
    assert state is not None

    with pytest.raises(FolderInUse, match=str(state.pid)):
        EmbeddedServer(tmp_path / "home").start()
    with client_of(url) as client:
        assert client.admin.command("ping")["ok"] == 1


def test_folder_stays_locked_while_the_server_lives(tmp_path: Path) -> None:
    """The lock belongs to the server as well as to whoever started it."""
    with EmbeddedServer(tmp_path / "home") as server:
        assert server._lock is not None
        os.close(server._lock)  # as if the starting process were gone
        server._lock = None
        with pytest.raises(FolderInUse):
            EmbeddedServer(tmp_path / "home").start()


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{}",
        "[]",
        '{"pid": 1, "create_time": 0, "port": 1, "kind": "mongod", "more": 1}',
        json.dumps({"pid": 999_999_999, "create_time": 1.0, "port": 1, "kind": "mongod"}),
        # A pid that was given to somebody else: this process, with another start time.
        json.dumps({"pid": os.getpid(), "create_time": 1.0, "port": 1, "kind": "mongod"}),
        # A process that lives and does not listen there.
        json.dumps(
            {"pid": os.getpid(), "create_time": psutil.Process().create_time(), "port": 1, "kind": "mongod"}
        ),
    ],
    ids=["empty", "object", "list", "other-fields", "no-process", "pid-came-back", "no-answer"],
)
def test_stale_state_is_ignored(tmp_path: Path, state: str) -> None:
    """What a crash left in the state file is neither taken for a server nor in the way of one."""
    home = tmp_path / "home"
    home.mkdir()
    (home / STATE_FILE).write_text(state)

    assert running(home) is None
    with EmbeddedServer(home) as server:
        assert running(home) is not None
        assert server.alive


def test_taken_port_is_left_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If somebody takes the chosen port first, even another database, another port is chosen."""
    with EmbeddedServer(tmp_path / "first") as first:
        taken = running(first.home)
        assert taken is not None
        ports = iter([taken.port])
        monkeypatch.setattr("core4.embedded.free_port", lambda: next(ports, None) or _unused_port(taken.port))
        with EmbeddedServer(tmp_path / "second") as second:
            state = running(second.home)
            assert state is not None
            assert state.port != taken.port
            assert state.pid != taken.pid


def _unused_port(other: int) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port if port != other else _unused_port(other)


def test_restart_keeps_the_port(tmp_path: Path) -> None:
    """A server that ended and is started again is where its clients look for it."""
    server = EmbeddedServer(tmp_path / "home")
    with server:
        before, state = server.url, running(server.home)
        assert state is not None
        os.kill(state.pid, signal.SIGKILL)
        eventually(lambda: not server.alive, what="the server is gone")
        server.stop()
        assert server.start() == before


def test_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    """The server's own last words are in the message, and nothing is left locked."""
    home = tmp_path / "home"
    kind, _ = find_server(home)
    with EmbeddedServer(home):
        pass
    (home / "database" / kind / "WiredTiger.turtle").write_bytes(b"garbage" * 1000)

    with pytest.raises(ConfigError, match=r"does not start: .*corruption") as caught:
        EmbeddedServer(home).start()
    assert str(home / "embedded.log") in str(caught.value)
    # Another attempt meets the same trouble and no lock.
    with pytest.raises(ConfigError, match="does not start"):
        EmbeddedServer(home).start()


def test_no_server_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any server the message says what to install or to set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    with pytest.raises(NoServer, match=r"core4-jobs\[embedded\].*CORE4_MONGO_URL"):
        EmbeddedServer(tmp_path / "home").start()


def test_better_server_does_not_hide_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first choice is mongod; a folder with data of another server stays with that one."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("mongod", "secantusd-rs", "secantusd-py"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    used = tmp_path / "used"
    (used / "database" / "secantusd-py").mkdir(parents=True)

    assert find_server(tmp_path / "new") == ("mongod", str(tools / "mongod"))
    assert find_server(used) == ("secantusd-py", str(tools / "secantusd-py"))


def test_a_server_that_keeps_old_keys_is_told_from_others(mongo_url: str, database_name: str) -> None:
    """The look that keeps secantusd-rs out while it has this fault: a key that stays taken is found."""
    with MongoClient[dict[str, Any]](mongo_url) as client:
        database = client[database_name]
        assert frees_keys(database["sound"])
        database["stale"].insert_one({"_id": "stays", "key": 1})
        assert not frees_keys(database["stale"])
        client.drop_database(database_name)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    """A data folder that cannot be made is a settings problem with its path."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=str(tmp_path / "file" / "home")):
        EmbeddedServer(tmp_path / "file" / "home").start()


def test_refuses_another_thread(tmp_path: Path) -> None:
    """The end of the starting thread would end the server: only the main thread may start it."""
    caught: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedServer(tmp_path / "home").start()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert "main thread" in str(caught[0])
    with EmbeddedServer(tmp_path / "home") as server:  # and nothing stays locked
        assert server.alive


def test_database_url_prefers_the_configured_one(tmp_path: Path) -> None:
    """A configured URL is used as it is; else a running server is found; else one is started or asked for."""
    configured = Settings(mongo_url="mongodb://db1", home=tmp_path / "home")
    embedded = Settings(home=tmp_path / "home")

    with database_url(configured) as url:
        assert url == "mongodb://db1"
    with pytest.raises(ConfigError, match="CORE4_MONGO_URL"), database_url(embedded):
        pass
    with database_url(embedded, start=True) as url, database_url(embedded) as found:
        assert found == url
    assert running(tmp_path / "home") is None
