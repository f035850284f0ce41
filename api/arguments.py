"""The arguments of a request: query string and JSON body in one, for every method (core4.md 1.1)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from aiohttp import web
from marshmallow import Schema, ValidationError, missing
from webargs.aiohttpparser import AIOHTTPParser

from core4.errors import BadRequest
from core4.schemas import Unreadable, read_json

BODY_TIME = 10.0  # seconds within which a body has to arrive

_MERGED = "merged"
_GIVEN = web.RequestKey(_MERGED, Mapping[str, Any])
_parser = AIOHTTPParser(location=_MERGED)


async def parse(schema: type[Schema], request: web.Request) -> dict[str, Any]:
    """The checked arguments of a request.

    Raises: BadRequest naming what is wrong; HTTPException 413 or 415 for a body that is not read.
    """
    given = request[_GIVEN] = await _merged(request)
    if not (given or _whole(schema).fields):
        return {}  # most of what is asked for by its address alone takes nothing
    part = _part(schema, given)
    parsed: dict[str, Any] = await _parser.parse(part, request, unknown=part.unknown)
    return parsed


@_parser.location_loader(_MERGED)
def _given(request: web.Request, _: Schema) -> Mapping[str, Any]:
    return request[_GIVEN]


@_parser.error_handler
def _refuse(error: ValidationError, *_: object, **__: object) -> NoReturn:
    _complain(error.messages_dict.get(_MERGED, {}))


@lru_cache
def _whole(schema: type[Schema]) -> Schema:
    """One for all requests: making one copies each of its fields."""
    return schema()


def _part(schema: type[Schema], given: Iterable[str]) -> Schema:
    """What matters of a schema if so much is given: a job has thirty options, and hardly any is."""
    return _of(schema, frozenset(_whole(schema).fields.keys() & given))


@lru_cache(maxsize=500)
def _of(schema: type[Schema], given: frozenset[str]) -> Schema:
    fields = _whole(schema).fields
    always = {name for name, field in fields.items() if field.required or field.load_default is not missing}
    return schema(only=[name for name in fields if name in given | always])


async def _merged(request: web.Request) -> dict[str, Any]:
    # Iterating a query repeats a name in order, so that its last value stands; a body beats it.
    query = dict(request.query.items()) if request.query_string else {}
    return {**query, **await _body(request)} if request.can_read_body else query


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        # A short one has come with its head.
        async with asyncio.timeout(None if request.content.is_eof() else BODY_TIME):
            raw = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body has not arrived within {BODY_TIME:g} s") from None
    if not raw.strip():
        return {}
    _check_type(request)
    try:
        body = read_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except Unreadable as error:
        raise BadRequest(f"the body {error}") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # a number of more digits than Python converts
        raise BadRequest("the body has a number that is too long") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is JSON, but not an object")
    return body


def _check_type(request: web.Request) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise web.HTTPUnsupportedMediaType(text="a body must not be compressed")
    if "Content-Type" not in request.headers:
        return
    kind = request.content_type
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if is_json and (request.charset or "utf-8").lower() in ("utf-8", "utf8", "us-ascii"):
        return
    raise web.HTTPUnsupportedMediaType(
        text="a body must be JSON in UTF-8: send it with the header `Content-Type: application/json`"
    )


def checked(schema: type[Schema], given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what has been read already, one object of many in a body among it.

    Raises: BadRequest naming what is wrong.
    """
    try:
        loaded: dict[str, Any] = _part(schema, given).load(given)
    except ValidationError as error:
        _complain(error.messages_dict)
    return loaded


def _complain(messages: Mapping[str, Sequence[str]]) -> NoReturn:
    texts = [_text(name, message) for name, found in messages.items() for message in found]
    raise BadRequest("; ".join(texts[:5]) or "arguments not accepted")


def _text(name: str, message: str) -> str:
    """marshmallow's messages that do not name the argument, with it."""
    name = str(name)[:100]
    known = {
        "Missing argument": f"Missing argument {name}",
        "unknown argument": f"unknown argument [{name}]",
        "Field may not be null.": f"parameter [{name}] must not be null",
    }
    return known.get(message, message)
