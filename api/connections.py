"""One connection to the API: what is answered where no handler is asked, and who is cut."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
from contextlib import suppress
from typing import Any, cast

from aiohttp import web

from core4.api.errors import PROBLEM, Handler, problem

log = logging.getLogger(__name__)

HEAD_TIME = 10.0  # seconds within which the head of a connection's first request has to arrive
STALLED = 20.0  # seconds within which at least LEAST bytes have to be taken of what waits, or all
LEAST = 32_768
LOOK = 5.0  # seconds between two looks at all connections
AT_ONCE = 100  # connections that are looked at before others get their turn


@web.middleware
async def heard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The head of a request is there: the connection may stay. An application has connections of its own."""
    if isinstance(request.protocol, Connection):
        request.protocol.heard()
    return await handler(request)


async def cut_stalled(server: web.Server) -> None:
    """Cut those who do not read, for ever: each holds memory and a file."""
    while True:
        await asyncio.sleep(LOOK)
        now, cut = asyncio.get_running_loop().time(), 0
        for number, each in enumerate(server.connections):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)  # thousands take milliseconds, which requests would wait
            cut += cast(Connection, each).look(now)
        if cut:  # one line for all: whoever opens thousands must not fill the disk
            log.warning("connections.stalled", extra={"cut": cut})


class Connection(web.RequestHandler):
    """HTTP as aiohttp speaks it, except that answers which no middleware sees are problems, too:
    those to requests that cannot be parsed, and to an `Expect` nobody can fulfil.

    Who connects has `HEAD_TIME` to send the head of a request: each connection is an open file, and
    aiohttp itself would wait for an hour. For who takes no answer it would wait for ever, see `look`.
    """

    __slots__ = ("_deadline", "_left", "_since", "_wire")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = cast(asyncio.Transport, transport)  # aiohttp forgets its own when it closes it
        self._left, self._since = 0, 0.0
        self._deadline = asyncio.get_running_loop().call_later(HEAD_TIME, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def heard(self) -> None:
        """The first request is there."""
        self._deadline.cancel()

    def resume_writing(self) -> None:
        """What was waiting has been taken, but for a little."""
        self._left = 0
        super().resume_writing()

    def look(self, now: float) -> bool:
        """Cut who takes next to nothing of what waits for him; True then. Called again and again."""
        left = _waiting(self._wire)
        if not left or not self._left or self._left - left >= LEAST:
            self._left, self._since = left, now
            return False
        if now - self._since < STALLED:
            return False
        self._wire.abort()
        return True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        # aiohttp would log a traceback for each: whoever sends garbage could fill the disk.
        log.debug("request.malformed", extra={"remote": request.remote, "error": repr(exc)[:200]})
        answer = problem(request, status, (message or "not HTTP").strip().split("\n")[0][:200])
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **options: Any) -> None:
        # A body that breaks off is the client's doing and has been answered.
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if resp.status >= 400 and resp.content_type != PROBLEM and not resp.prepared:
            bare, resp = resp, problem(request, resp.status, _plain_text(resp))
            if not bare.keep_alive:
                resp.force_close()
        return await super().finish_response(request, resp, start_time)


def _waiting(wire: asyncio.Transport) -> int:
    """The bytes that somebody has still to take; 0 if the kernel holds them all.

    The kernel's count, too: it asks for more only when it has got rid of megabytes.
    """
    left = wire.get_write_buffer_size()
    if left:
        number = bytearray(4)
        with suppress(OSError, ValueError):  # it is gone
            fcntl.ioctl(wire.get_extra_info("socket").fileno(), termios.TIOCOUTQ, number)
        left += int.from_bytes(number, sys.byteorder)
    return left


def _plain_text(resp: web.StreamResponse) -> str:
    if resp.status >= 500:
        return "internal error"
    text = resp.text if isinstance(resp, web.Response) else None
    return (text or resp.reason).strip().split("\n")[0][:200]
