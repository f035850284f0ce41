"""`Client.follow` against a server that cuts, refuses and restarts: nothing lost, nothing twice."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from core4.client import ApiError, Client, CloseEvent, LogEvent, StateEvent, Unreachable
from core4.errors import ConfigError
from tests.helpers import free_port

Request = tuple[str, dict[str, str]]  # first line, headers
Answer = bytes | Callable[[Request], bytes]

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(text: str) -> bytes:
    """One chunk of a response."""
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(name: str, cursor: str, data: object) -> str:
    return f"event: {name}\nid: {cursor}\ndata: {json.dumps(data)}\n\n"


def log(number: int) -> str:
    return event("log", f"1.{number}", {"message": f"line {number}", "level": "INFO"})


def answer(status: str, body: object = None) -> bytes:
    """A whole response."""
    data = b"" if body is None else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextmanager
def server(*answers: bytes) -> Iterator[tuple[str, list[Request]]]:
    """A server that gives one answer per connection and then hangs up; yields URL and requests."""
    left, requests = list(answers), list[Request]()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            first, headers = self.rfile.readline().decode().strip(), {}
            while line := self.rfile.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            requests.append((first, headers))
            if left:
                self.wfile.write(left.pop(0))

    with _Server(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}", requests
        finally:
            listener.shutdown()
            thread.join()


def test_events_are_typed() -> None:
    """State, log and close arrive as what they are; what is unknown is skipped."""
    stream = (
        "retry: 10\n\n: ping\n\n"
        + event("state", "1.0", {"_id": "a", "state": "running", "prog": {"value": 0.5}})
        + log(1)
        + event("weather", "1.1", {"sun": True})
        + event("close", "2.1", {"state": 1, "log": 1})
    )
    with server(STREAM + chunk(stream) + END) as (url, _), Client(url) as client:
        state, line, close = list(client.follow("a"))

    assert isinstance(state, StateEvent)
    assert (state.state, state.progress, state.id) == ("running", 0.5, "1.0")
    assert isinstance(line, LogEvent)
    assert (line.message, line.level) == ("line 1", "INFO")
    assert close == CloseEvent("2.1", {"state": 1, "log": 1})


def test_resumes_where_it_was_cut() -> None:
    """After a cut in the middle of an event, an end without `close` and a 503, each line comes once."""
    first = STREAM + chunk("retry: 1\n\n" + log(1) + log(2)) + chunk(log(3)[:20])
    second = STREAM + chunk(log(3)) + END
    third = answer("503 Service Unavailable", {"detail": "restarting"})
    fourth = STREAM + chunk(log(4) + event("close", "2.4", {})) + END
    with server(first, second, third, fourth) as (url, requests), Client(url) as client:
        outages: list[str] = []
        events = list(client.follow("a", on_lost=outages.append))

    assert [each.id for each in events] == ["1.1", "1.2", "1.3", "1.4", "2.4"]
    assert len(outages) == 2  # the 503 belongs to the second one
    assert [headers.get("last-event-id") for _, headers in requests] == [None, "1.2", "1.3", "1.3"]


def test_follower_who_has_read_everything_just_ends() -> None:
    """204 is the end: no event, no further attempt."""
    with server(answer("204 No Content")) as (url, requests), Client(url) as client:
        assert list(client.follow("a", "2.4")) == []

    assert len(requests) == 1
    assert requests[0][1]["last-event-id"] == "2.4"


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "404 Not Found", "503 Unavailable"])
def test_refused_at_first_is_an_error(status: str) -> None:
    """What is refused before anything was received is told, not retried."""
    with (
        server(answer(status, {"detail": "no"})) as (url, requests),
        Client(url) as client,
        pytest.raises(ApiError, match="no") as caught,
    ):
        list(client.follow("a"))

    assert caught.value.status == int(status[:3])
    assert len(requests) == 1


def test_job_that_vanishes_in_between_is_an_error() -> None:
    """A 404 after a cut ends the following: the job was deleted."""
    with (
        server(STREAM + chunk("retry: 1\n\n" + log(1)), answer("404 Not Found", {"detail": "gone"})) as (
            url,
            _,
        ),
        Client(url) as client,
        pytest.raises(ApiError, match="gone"),
    ):
        list(client.follow("a"))


def test_gives_up_after_its_patience() -> None:
    """A server that does not come back is reported, once the patience is used up."""
    with server(STREAM + chunk("retry: 1\n\n" + log(1))) as (url, _), Client(url) as client:
        events = client.follow("a", patience=0.05)
        assert next(events).id == "1.1"
    with pytest.raises(Unreachable):
        next(events)


def test_silent_server_is_left() -> None:
    """No byte and no heartbeat within the read timeout counts as a lost connection."""
    hung = threading.Event()

    class Silent(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            if hung.is_set():
                self.wfile.write(answer("204 No Content"))
                return
            hung.set()
            self.wfile.write(STREAM + chunk("retry: 1\n\n" + log(1)))
            self.wfile.flush()
            self.rfile.read()  # until the client hangs up

    with _Server(("127.0.0.1", 0), Silent) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.server_address[1]}"
            with Client(url, timeout=(5, 0.2)) as client:
                assert [each.id for each in client.follow("a")] == ["1.1"]
        finally:
            listener.shutdown()
            thread.join()


def test_nobody_listens() -> None:
    """An API that does not run is reported at once, with its address."""
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(Unreachable, match=f"{url}: connection refused\n") as raised:
        client.show("a")
    assert str(raised.value).endswith("\nIs it running? Start it with `core4 up`, or set CORE4_URL.")
    assert "\n" not in raised.value.detail


def test_no_api_behind_the_url() -> None:
    """An answer that is none of ours says so."""
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
    with server(page) as (url, _), Client(url) as client, pytest.raises(ApiError, match="core4 API"):
        client.show("a")


def test_redirect_is_not_followed() -> None:
    """Credentials do not travel to where a redirect leads; the message names the place."""
    moved = answer("302 Found").replace(b"Connection", b"Location: http://elsewhere/\r\nConnection")
    with (
        server(moved) as (url, requests),
        Client(url, ("a", "b")) as client,
        pytest.raises(ApiError, match="http://elsewhere/"),
    ):
        client.kill("a")

    assert len(requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "localhost:5001",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://a:b@host",
        "http://host/?token=1",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    """Only http and https, and no credentials in the URL; the message does not repeat them."""
    with pytest.raises(ConfigError) as caught:
        Client(url)

    assert "a:b" not in str(caught.value)


def test_credentials_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password come from the environment, in UTF-8, and are in no repr."""
    monkeypatch.setenv("CORE4_USER", "ä")
    monkeypatch.setenv("CORE4_PASSWORD", "pass€word")
    with server(answer("200 OK", {"data": {}})) as (url, requests), Client(url) as client:
        client.count()

    assert requests[0][1]["authorization"] == "Basic w6Q6cGFzc+KCrHdvcmQ="
    assert "word" not in repr(client) + repr(vars(client))


def test_token_beats_user_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of the environment is sent even if there is a user as well."""
    monkeypatch.setenv("CORE4_USER", "a")
    monkeypatch.setenv("CORE4_TOKEN", "t0ken")
    with server(answer("200 OK", {"data": {}})) as (url, requests), Client(url) as client:
        client.count()

    assert requests[0][1]["authorization"] == "Bearer t0ken"
