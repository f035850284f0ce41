"""Who is calling: basic authentication, bearer tokens, the browser's cookie and stream tickets."""

from __future__ import annotations

import binascii
from base64 import b64decode
from functools import lru_cache
from urllib.parse import urlsplit

from aiohttp import web

from core4 import handshake
from core4.api.addresses import client_address, neighbourhood
from core4.api.keys import EVENTS, LOCAL_SECRET, LOCAL_USER, SIGN_INS, TOKEN, TOKEN_TEXT, USERS
from core4.config import DEFAULT_USER, is_loopback
from core4.errors import Unauthenticated
from core4.users import User

COOKIE = "token"
_SAFE = ("GET", "HEAD")


async def authenticate(request: web.Request, *, ticket: bool = False, cookie: bool = True) -> User:
    """The user who sends a request; `ticket` where a stream ticket will do, not `cookie` where it will not.

    Raises: Unauthenticated, TooManyRequests.
    """
    scheme, _, credentials = request.headers.get("Authorization", "").strip().partition(" ")
    match scheme.lower():
        case "basic":
            return await sign_in(request, *_decoded(credentials.strip()))
        case "bearer":
            return await _bearer(request, credentials.strip())
        case "":
            return await _browser(request, ticket=ticket, cookie=cookie)
    raise Unauthenticated(f"the authentication scheme [{scheme[:30]}] is neither Basic nor Bearer")


async def sign_in(request: web.Request, name: str, password: str) -> User:
    """The user of this name and password. Only a guess counts: what is known to be right does not.

    Raises: Unauthenticated, TooManyRequests.
    """
    if (name.lower(), password) == DEFAULT_USER and not is_loopback(_host(request)):
        # Everybody knows them. A page whose name leads to this machine (DNS rebinding) may try them from
        # the browser of somebody who works here, or a proxy may let others in.
        raise Unauthenticated(
            "the default credentials are good under http://localhost only; "
            f"change them with `core4 user passwd {DEFAULT_USER[0]}`"
        )
    if (secret := request.app.get(LOCAL_SECRET)) is not None:
        return _local_user(request, name, password, secret)
    sign_ins = request.app[SIGN_INS]
    guessed: tuple[str, str] | None = None

    def before_check() -> None:
        nonlocal guessed
        key = name.lower()[:200], neighbourhood(client_address(request))
        sign_ins.take(*key)
        guessed = key

    user = await request.app[USERS].verify(name, password, before_check=before_check)
    if user is None:
        if guessed and sign_ins.is_news():
            shown = name[:100].encode("ascii", "backslashreplace").decode()
            await request.app[EVENTS].tell("session.refused", shown, remote=client_address(request))
        raise Unauthenticated("user name or password is wrong")
    if guessed:
        sign_ins.give_back(*guessed)
    return user


def _local_user(request: web.Request, name: str, password: str, secret: str) -> User:
    """The one user of a manager that was given no others: good on its own machine only.

    Raises: Unauthenticated, TooManyRequests.
    """
    if not _is_local(request):
        raise Unauthenticated(
            "this manager has no users beyond its own machine: give `JobManager.create` some with users="
        )
    sign_ins, key = request.app[SIGN_INS], (LOCAL_USER, neighbourhood(client_address(request)))
    sign_ins.take(*key)
    if name.lower() != LOCAL_USER or not handshake.same(password, secret):
        raise Unauthenticated("user name or password is wrong")
    sign_ins.give_back(*key)
    return User(LOCAL_USER, ("cop",), True, 1, {"name": LOCAL_USER, "perm": ["cop"]})


def _is_local(request: web.Request) -> bool:
    """True if the connection has come to an address that only this machine reaches, by such a name."""
    own = request.transport.get_extra_info("sockname") if request.transport is not None else None
    host = own[0] if isinstance(own, tuple) else "localhost"  # else a Unix socket
    return is_loopback(host) and is_loopback(_host(request))


async def _bearer(request: web.Request, text: str) -> User:
    users = request.app[USERS]
    accepted = await users.accept(text)
    if accepted is None:
        raise Unauthenticated("the token is unknown, expired or revoked")
    request[TOKEN], request[TOKEN_TEXT] = accepted, text
    return accepted.user


async def _browser(request: web.Request, *, ticket: bool, cookie: bool) -> User:
    if ticket and request.query.get("ticket"):
        user = await request.app[USERS].redeem(request.query["ticket"])
        if user is None:
            raise Unauthenticated("the ticket is unknown, expired or used")
        return user
    # A cookie is sent by whatever page makes the browser ask: good for reading, never for changing.
    if cookie and request.method in _SAFE and request.cookies.get(COOKIE):
        return await _bearer(request, request.cookies[COOKIE])
    raise Unauthenticated


def _host(request: web.Request) -> str:
    """The name under which the client knows us, without the port."""
    return _hostname(request.host)


@lru_cache(maxsize=1000)
def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _decoded(credentials: str) -> tuple[str, str]:
    try:
        raw = b64decode(credentials, validate=True)
    except (binascii.Error, ValueError):
        raise Unauthenticated("the basic credentials are not base64") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # what Python's requests sends
    name, colon, password = text.partition(":")
    if not colon:
        raise Unauthenticated("the basic credentials have no colon")
    return name, password
