"""Followers cut over and over, at two API processes of which one is killed, miss and double nothing."""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from core4.embedded import running
from tests.helpers import (
    BASE,
    FAST,
    ROOT,
    Command,
    Stack,
    eventually,
    free_port,
    program,
    running_stack,
)

LINES, FOLLOWERS, CUTS = 2_500, 10, 20  # lines of each of four attempts; cuts of each follower
RESET = struct.pack("ii", 1, 0)


class Cut(Exception):
    """The connection ended."""


class Follower(threading.Thread):
    """Follows one job with raw sockets; resets the connection at a random byte, often within a frame."""

    def __init__(self, job_id: str, apis: list[str], auth: tuple[str, str], seed: int) -> None:
        super().__init__(daemon=True)
        self._path, self._apis = f"{BASE}/job/follow/{job_id}", apis
        self._auth = base64.b64encode(":".join(auth).encode()).decode()
        self._random = random.Random(seed)
        self._last_id: str | None = None
        self.cuts = self.half_frames = 0
        self.finished = False
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.finished:
                self._connect()
        except BaseException as error:  # shown by the test
            self.failure = error

    def _connect(self) -> None:
        api = urlsplit(self._random.choice(self._apis))
        budget = self._random.randrange(200, 150_000) if self.cuts < CUTS else None
        try:
            with socket.create_connection((api.hostname, api.port), timeout=60) as peer:
                peer.sendall(self._request().encode())
                self._read(peer, budget)
        except (ConnectionError, Cut):
            return

    def _request(self) -> str:
        # HTTP/1.0: the body comes as it is, without chunks, until the server closes.
        resume = f"Last-Event-ID: {self._last_id}\r\n" if self._last_id else ""
        return f"GET {self._path} HTTP/1.0\r\nAuthorization: Basic {self._auth}\r\n{resume}\r\n"

    def _read(self, peer: socket.socket, budget: int | None) -> None:
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            buffer += self._receive(peer)
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        status = head.split()[1]
        if status == b"204":
            self.finished = True
            return
        assert status == b"200", head
        seen = 0
        while True:
            buffer = self._frames(buffer)
            if self.finished:
                return
            if budget is not None and seen > budget:
                self.cuts += 1
                self.half_frames += bool(buffer)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                raise Cut
            chunk = self._receive(peer)
            seen += len(chunk)
            buffer += chunk

    def _receive(self, peer: socket.socket) -> bytes:
        chunk = peer.recv(self._random.choice([7, 300, 5000]))
        if not chunk:
            raise Cut
        return chunk

    def _frames(self, buffer: bytes) -> bytes:
        """Take the whole frames off; returns the half one at the end."""
        buffer = buffer.replace(b"\r\n", b"\n")
        while b"\n\n" in buffer and not self.finished:
            frame, _, buffer = buffer.partition(b"\n\n")
            self._event(frame.decode())
        return buffer

    def _event(self, frame: str) -> None:
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if ": " in line and line[0] != ":")
        if "event" not in fields:
            return
        self.events.append((fields["event"], fields["id"], json.loads(fields["data"])))
        self._last_id = fields["id"]
        self.finished = fields["event"] == "close"


def stored_log(stack: Stack, job_id: str) -> list[int]:
    """The numbers of all lines, by the pages of the log."""
    seqs: list[int] = []
    for page in range(1_000):
        rows = stack.data("GET", f"/job/log/{job_id}", params={"page": page, "per_page": 500})
        if not rows:
            return seqs
        seqs += [row["seq"] for row in rows]
    raise AssertionError("more pages than lines")


@pytest.mark.timeout(300)
def test_followers_cut_two_hundred_times(tmp_path: Path) -> None:
    """What each follower got is what is stored: in order, once, every transition, one close."""
    with running_stack(tmp_path, ROOT / "tests/jobs/ledger.py") as stack:
        server = running(tmp_path)
        assert server is not None
        port = free_port()
        environ = {**FAST, "CORE4_MONGO_URL": server.url, "CORE4_PORT": str(port)}
        with Command([program("core4"), "api"], environ) as second:
            second.wait_for("ready")
            apis = [stack.url, f"http://127.0.0.1:{port}"]
            job_id = stack.enqueue("tests.jobs.ChattyJob", lines=LINES)
            followers = [Follower(job_id, apis, stack.auth, seed) for seed in range(FOLLOWERS)]
            for follower in followers:
                follower.start()
            eventually(
                lambda: sum(follower.cuts for follower in followers) >= FOLLOWERS * CUTS // 4,
                120,
                what="a quarter of the cuts",
            )
            second.process.kill()
            for follower in followers:
                follower.join(200)
            second.wait()
        failures = [follower.failure for follower in followers if follower.failure]
        assert not failures
        assert all(follower.finished for follower in followers)
        assert sum(follower.cuts for follower in followers) >= FOLLOWERS * CUTS
        assert sum(follower.half_frames for follower in followers) >= FOLLOWERS
        log = stored_log(stack, job_id)
        history = stack.job(job_id)["history"]
    assert len(log) >= 4 * LINES
    transitions = [(entry["rev"], entry["state"]) for entry in history]
    assert [state for _, state in transitions].count("failed") == 3
    for follower in followers:
        kinds = [kind for kind, _, _ in follower.events]
        assert kinds.count("close") == 1
        assert kinds[-1] == "close"
        assert [data["seq"] for kind, _, data in follower.events if kind == "log"] == log
        states = [(data["rev"], data["state"]) for kind, _, data in follower.events if kind == "state"]
        assert [rev for rev, _ in states] == sorted({rev for rev, _ in states})
        assert [state for state in states if state in transitions] == transitions
