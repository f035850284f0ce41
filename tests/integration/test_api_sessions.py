"""Signing in and out, guessing, and what browsers may do."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from dataclasses import replace
from datetime import timedelta
from http.cookies import SimpleCookie
from typing import Any

import pytest

from core4.config import Settings
from core4.database import Database
from core4.jobs import utcnow
from core4.users import TOKEN, UserStore
from tests.helpers import eventually_async
from tests.integration.driver import ADMIN, Api, basic, bearer, serving

FORM = {"username": ADMIN[0], "password": ADMIN[1]}


@pytest.mark.row("S20")
async def test_login(api: Api) -> None:
    """By header or by JSON body; body and header hold the same token, and it opens."""
    for method, options in (
        ("GET", {"auth": ADMIN}),
        ("POST", {"auth": ADMIN}),
        ("POST", {"auth": None, "json": FORM}),
        ("GET", {"auth": None, "json": FORM}),
    ):
        answer = await api.call(method, "/login", **options)
        token = answer.data["token"]

        assert answer.headers["token"] == token
        assert (await api.call("GET", "/profile", auth=None, headers=bearer(token))).status == 200
        assert (await api.call("GET", "/login", auth=None, headers=bearer(token))).status == 200


@pytest.mark.row("S20")
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 401),
        ({"json": {**FORM, "password": "no"}}, 401),
        ({"json": {**FORM, "username": "nobody"}}, 401),
        ({"json": {**FORM, "password": "a\0b"}}, 401),
        ({"json": {**FORM, "password": "x" * 100_000}}, 401),
        ({"json": {"username": "admin"}}, 400),
        ({"json": {"password": "hans"}}, 400),
        ({"json": {**FORM, "username": {"$ne": None}}}, 400),
        ({"params": FORM}, 400),
        ({"headers": bearer("nope")}, 401),
        ({"headers": {"Authorization": "Digest x"}}, 401),
        ({"headers": {"Authorization": "Basic"}}, 401),
        ({"headers": {"Authorization": "Basic !!!"}}, 401),
        ({"headers": {"Authorization": "Basic " + b64encode(b"admin").decode()}}, 401),
        ({"headers": basic("admin", "")}, 401),
        ({"headers": basic("admin\0", "hans")}, 401),
        ({"headers": basic("", "")}, 401),
    ],
)
async def test_wrong_credentials(api: Api, options: dict[str, Any], status: int) -> None:
    """Whatever is wrong, nobody gets in, and nothing breaks."""
    answer = await api.call("POST", "/login", auth=None, **options)

    assert answer.status == status, answer.body
    assert "token" not in answer.headers


@pytest.mark.row("S21")
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/job"), ("POST", "/job"), ("PUT", "/job/kill/x"), ("GET", "/job/follow/x")]
)
async def test_protected(api: Api, method: str, path: str) -> None:
    """Without credentials 401 at once, no redirect, with a challenge; names in the address do not help."""
    for options in ({}, {"params": FORM}, {"params": {"token": "x"}}):
        answer = await api.call(method, path, auth=None, allow_redirects=False, **options)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert answer.body["type"] == "urn:core4:problem:unauthenticated"


async def test_no_dialog_for_scripts(api: Api) -> None:
    """A script in a page is not answered with what opens the browser's own dialog."""
    answer = await api.call("GET", "/profile", auth=None, headers={"Sec-Fetch-Dest": "empty"})

    assert "Basic" not in answer.headers["WWW-Authenticate"]


async def test_passwords_with_colons_and_umlauts(api: Api, users: UserStore) -> None:
    """Both are characters like others, as UTF-8 or as what Python's requests makes of them."""
    await users.add("ann", "pä:ss", [])
    latin = {"Authorization": "Basic " + b64encode("ann:pä:ss".encode("latin-1")).decode()}

    assert (await api.call("GET", "/profile", auth=("ann", "pä:ss"))).status == 200
    assert (await api.call("GET", "/profile", auth=None, headers=latin)).status == 200


@pytest.mark.row("S22")
async def test_token_life(api: Api, settings: Settings, database: Database) -> None:
    """Past the refresh age a new token comes beside the answer; past its life the old one is refused."""
    async with serving(replace(settings, token_ttl=2.0), database) as short:
        token = (await short.call("GET", "/login")).data["token"]

        async def refreshed() -> str | None:
            answer = await short.call("GET", "/profile", auth=None, headers=bearer(token))
            assert answer.status == 200
            return answer.headers.get("token")

        fresh = await eventually_async(refreshed, 2, what="a fresh token")
        assert fresh != token

        async def expired() -> bool:
            return (await short.call("GET", "/job", auth=None, headers=bearer(token))).status == 401

        await eventually_async(expired, 10, what="the token expires")


@pytest.mark.row("S22")
async def test_fresh_tokens_work(api: Api, database: Database) -> None:
    """The new token opens when the old one has expired."""
    token = (await api.call("GET", "/login")).data["token"]
    tokens = database.collection(TOKEN)
    await tokens.update_many({}, {"$set": {"created": utcnow() - timedelta(seconds=3000)}})
    fresh = (await api.call("GET", "/profile", auth=None, headers=bearer(token))).headers["token"]
    await tokens.update_many(
        {"created": {"$lt": utcnow() - timedelta(seconds=2000)}}, {"$set": {"expires": utcnow()}}
    )

    assert (await api.call("GET", "/profile", auth=None, headers=bearer(token))).status == 401
    assert (await api.call("GET", "/profile", auth=None, headers=bearer(fresh))).status == 200


async def test_logout(api: Api) -> None:
    """The token is worth nothing afterwards."""
    token = (await api.call("GET", "/login")).data["token"]
    assert (await api.call("POST", "/logout", auth=None, headers=bearer(token))).data is True

    assert (await api.call("GET", "/profile", auth=None, headers=bearer(token))).status == 401


async def test_profile(api: Api) -> None:
    """One's own document, never the password."""
    token = (await api.call("GET", "/login")).data["token"]
    profile = (await api.call("GET", "/profile", auth=None, headers=bearer(token))).data

    assert (profile["name"], profile["perm"], profile["is_active"]) == ("admin", ["cop"], True)
    assert profile["token_expires"]
    assert "password" not in profile


async def test_guessing(api: Api, users: UserStore) -> None:
    """The eleventh guess waits; others do not, nor does who is signed in."""
    await users.add("ann", "secret", [])
    await users.add("bob", "secret", [])
    assert (await api.call("GET", "/profile", auth=("ann", "secret"))).status == 200
    answers = [await api.call("GET", "/profile", auth=("ann", f"guess {n}")) for n in range(11)]

    assert [answer.status for answer in answers] == [401] * 10 + [429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 30
    assert answers[-1].body["type"] == "urn:core4:problem:too_many_requests"
    assert (await api.call("GET", "/profile", auth=("bob", "secret"))).status == 200
    assert (await api.call("GET", "/profile", auth=("ann", "secret"))).status == 200


async def test_many_at_once_with_the_right_password(api: Api) -> None:
    """A hundred requests that come before the first check is done are no guesses."""
    answers = await asyncio.gather(*(api.call("GET", "/profile") for _ in range(100)))

    assert {answer.status for answer in answers} == {200}


def cookie_of(answer: Any) -> Any:
    return SimpleCookie(answer.headers["Set-Cookie"])["token"]


async def test_cookie(api: Api, settings: Settings, database: Database) -> None:
    """It is out of reach of scripts and other sites, and good for reading only."""
    cookie = cookie_of(await api.call("POST", "/login", auth=None, json=FORM))
    headers = {"Cookie": f"token={cookie.value}"}

    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["secure"]) == (
        True,
        "Strict",
        "/",
        "",
    )
    assert (await api.call("GET", "/job", auth=None, headers=headers)).status == 200
    assert (await api.call("HEAD", "/job", auth=None, headers=headers)).status == 200
    for method, path in (
        ("POST", "/job"),
        ("POST", "/job/queue"),
        ("PUT", "/job/kill/x"),
        ("POST", "/ticket"),
    ):
        assert (await api.call(method, path, auth=None, headers=headers)).status == 401
    out = await api.call("GET", "/logout", auth=None, headers=headers)
    assert cookie_of(out).value == ""
    assert (await api.call("GET", "/job", auth=None, headers=headers)).status == 401


async def test_secure_cookie_behind_tls(api: Api) -> None:
    """Where the browser's connection is encrypted, the cookie never leaves by another."""
    answer = await api.call("POST", "/login", auth=None, json=FORM, headers={"X-Forwarded-Proto": "https"})

    assert cookie_of(answer)["secure"] is True


async def test_ticket(api: Api) -> None:
    """It opens one stream, once, and nothing else."""
    job_id = await api.enqueue()
    await api.call("PUT", f"/job/kill/{job_id}")
    ticket = (await api.call("POST", "/ticket")).data["ticket"]

    assert (await api.call("GET", f"/job/{job_id}", auth=None, params={"ticket": ticket})).status == 401
    assert (await api.call("GET", "/job", auth=None, params={"ticket": ticket})).status == 401
    async with api.stream(f"/job/follow/{job_id}", auth=None, params={"ticket": ticket}) as stream:
        assert [event.kind async for event in stream][-1] == "close"
    again = await api.call("GET", f"/job/follow/{job_id}", auth=None, params={"ticket": ticket})
    assert again.status == 401


@pytest.mark.parametrize(
    ("origin", "method", "status"),
    [
        (None, "PUT", 404),
        ("http://evil.example", "PUT", 403),
        ("null", "PUT", 403),
        ("http://[", "PUT", 403),
        ("http://evil.example", "GET", 405),
        ("https://board.example.org", "PUT", 404),
        ("same", "PUT", 404),
    ],
)
async def test_origin(
    settings: Settings, database: Database, users: UserStore, origin: str | None, method: str, status: int
) -> None:
    """Pages of others change nothing, not even with the browser's credentials."""
    allowed = replace(settings, allow_origin=("https://board.example.org",))
    async with serving(allowed, database) as api:
        headers = {"Origin": api.root if origin == "same" else origin} if origin else {}
        answer = await api.call(method, "/job/kill/x", headers=headers)
        answer_headers = answer.headers

    assert answer.status == status
    shared = answer_headers.get("Access-Control-Allow-Origin")
    assert shared == (origin if origin == "https://board.example.org" else None)
    assert "Access-Control-Allow-Credentials" not in answer_headers


async def test_preflight(settings: Settings, database: Database, users: UserStore) -> None:
    """Answered without credentials; only listed origins are let in."""
    allowed = replace(settings, allow_origin=("https://board.example.org",))
    asked = {"Access-Control-Request-Method": "PUT"}
    async with serving(allowed, database) as api:
        listed = await api.call(
            "OPTIONS", "/job", auth=None, headers={"Origin": "https://board.example.org", **asked}
        )
        other = await api.call(
            "OPTIONS", "/job", auth=None, headers={"Origin": "https://evil.example", **asked}
        )

    assert (listed.status, other.status) == (200, 200)
    assert listed.headers["Access-Control-Allow-Origin"] == "https://board.example.org"
    assert "Authorization" in listed.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Origin" not in other.headers


async def test_headers_of_every_answer(api: Api) -> None:
    """Nothing is cached, guessed or framed."""
    for path in ("/job", "/nothing", "/job/nope", "livez"):
        headers = (await api.call("GET", path)).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:5001", 200),
        ("127.0.0.2:80", 200),
        ("[::1]:5001", 200),
        ("evil.example:5001", 401),
        ("localhost.evil.example", 401),
        ("127.0.0.1.evil.example", 401),
    ],
)
async def test_the_default_user_is_for_this_machine(api: Api, host: str, status: int) -> None:
    """A page whose name was made to lead here is of our origin to a browser, and knows the credentials."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    for options in ({"auth": ADMIN}, {"auth": None, "json": FORM}):
        assert (await api.call("POST", "/login", headers=headers, **options)).status == status
    await api.users.set_password(ADMIN[0], "my own")
    changed = await api.call("POST", "/login", headers={"Host": host}, auth=(ADMIN[0], "my own"))
    assert changed.status == 200


async def test_a_page_of_any_origin_cannot_use_what_the_browser_remembers(
    settings: Settings, database: Database, users: UserStore
) -> None:
    """With `*` a page may bring a token. Basic credentials are added by the browser to its forms, too."""
    origin = {"Origin": "https://evil.example"}
    async with serving(replace(settings, allow_origin=("*",)), database) as api:
        token = (await api.call("POST", "/login", auth=None, json=FORM, headers=origin)).data["token"]
        assert (await api.call("POST", "/ticket", auth=None, headers=origin | bearer(token))).status == 200
        assert (await api.call("POST", "/ticket", headers=origin)).status == 403


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)]
)
async def test_a_browser_that_holds_the_origin_back(api: Api, site: str, status: int) -> None:
    for method, path in (("POST", "/ticket"), ("GET", "/login")):
        assert (await api.call(method, path, headers={"Sec-Fetch-Site": site})).status == status
