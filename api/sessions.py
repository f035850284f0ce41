"""Handlers of signing in and out, and of what the user is told about himself."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from core4.api.auth import COOKIE, authenticate, sign_in
from core4.api.envelope import reply
from core4.api.keys import EVENTS, TOKEN, TOKEN_TEXT, USER, USERS
from core4.errors import BadRequest
from core4.users import User

Args = dict[str, Any]


async def login(request: web.Request, args: Args) -> web.Response:
    """GET or POST login: a bearer token for whoever proves who he is."""
    user = await _whoever(request, args)
    token, expires = await request.app[USERS].issue(user)
    await request.app[EVENTS].tell("session.login", user.name, remote=request.remote)
    response = reply(request, {"token": token, "expires": expires}, headers={"token": token})
    _set_cookie(request, response, token)
    return response


async def refresh(request: web.Request, response: web.StreamResponse) -> None:
    """Hand out a fresh token beside the answer if the one that was sent is past an eighth of its life."""
    fresh = await request.app[USERS].refresh(request[TOKEN_TEXT], request[TOKEN])
    if fresh is None:
        return
    response.headers["token"] = fresh
    if request.cookies.get(COOKIE) == request[TOKEN_TEXT]:
        _set_cookie(request, response, fresh)


async def _whoever(request: web.Request, args: Args) -> User:
    if "username" not in args and "password" not in args:
        return await authenticate(request)
    if {"username", "password"} & request.query.keys():
        raise BadRequest("user name and password belong into the body: addresses end up in logs")
    for name in ("username", "password"):
        if name not in args:
            raise BadRequest(f"Missing argument {name}")
    return await sign_in(request, args["username"], args["password"])


async def logout(request: web.Request, args: Args) -> web.Response:
    """GET or POST logout: the token that was sent is worth nothing any more."""
    if TOKEN_TEXT in request:
        await request.app[USERS].revoke(request[TOKEN_TEXT])
    response = reply(request, True)
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=_secure(request))
    return response


async def profile(request: web.Request, args: Args) -> web.Response:
    """GET profile: the user as stored, without the password."""
    user = request[USER]
    expires = request[TOKEN].expires if TOKEN in request else None
    shown = ("_id", "name", "is_active", "perm", "created", "updated")
    return reply(request, {**{key: user.document.get(key) for key in shown}, "token_expires": expires})


async def ticket(request: web.Request, args: Args) -> web.Response:
    """POST ticket: opens one stream within a minute, for browsers that cannot send a header."""
    text, expires = await request.app[USERS].ticket(request[USER])
    return reply(request, {"ticket": text, "expires": expires})


def _set_cookie(request: web.Request, response: web.StreamResponse, token: str) -> None:
    response.set_cookie(COOKIE, token, httponly=True, samesite="Strict", path="/", secure=_secure(request))


def _secure(request: web.Request) -> bool:
    # Behind a proxy the connection to us is plain, the browser's is not.
    return request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"
