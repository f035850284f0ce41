"""How a worker, its launcher and its job processes talk: JSON objects, each behind its length.

Pure functions; the other side is never trusted. Loads nothing but the interpreter.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from core4.errors import Core4Error

HEADER = struct.Struct(">I")
MAX_FRAME = 16 * 1024 * 1024  # bytes; what is longer is no frame of ours
TEXT_LIMIT = 64 * 1024  # characters of one log line; what is longer is cut

Message = dict[str, Any]


class ProtocolError(Core4Error):
    """The other side sent something that is no frame."""

    code = "protocol"


class _Reader(Protocol):
    async def readexactly(self, n: int, /) -> bytes: ...


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame.

    Raises: ProtocolError if it would be longer than anybody reads.
    """
    # Lone surrogates are legal in Python texts: both ends let them pass.
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(body)} bytes is too long")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The object in the body of a frame.

    Raises: ProtocolError.
    """
    try:
        message = json.loads(body, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame is not JSON: {str(error)[:200]}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a frame is no object but {type(message).__name__}")
    return message


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes.

        Raises: ProtocolError.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + length(self._buffer[: HEADER.size], self._limit)
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[HEADER.size : end])))
            del self._buffer[:end]
        return messages


def length(header: bytes | bytearray, limit: int = MAX_FRAME) -> int:
    """The length of the body that follows a header.

    Raises: ProtocolError if it is over `limit`.
    """
    size: int = HEADER.unpack(header)[0]
    if size > limit:
        raise ProtocolError(f"a frame of {size} bytes is over the limit of {limit}")
    return size


def receive(source: socket.socket, limit: int = MAX_FRAME) -> Message | None:
    """The next message of a blocking socket, None at its end.

    Raises: ProtocolError.
    """
    header = _exactly(source, HEADER.size)
    if header is None:
        return None
    body = _exactly(source, length(header, limit))
    return None if body is None else decode(body)


async def read(source: _Reader, limit: int = MAX_FRAME) -> Message | None:
    """The next message of an asyncio stream, None at its end, even in the middle of a frame.

    Raises: ProtocolError.
    """
    try:
        header = await source.readexactly(HEADER.size)
        return decode(await source.readexactly(length(header, limit)))
    except (EOFError, ConnectionError):  # asyncio's IncompleteReadError is an EOFError
        return None


def _exactly(source: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        data = source.recv(min(size - len(parts), 1 << 20))
        if not data:
            return None
        parts += data
    return bytes(parts)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text[:50])


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
