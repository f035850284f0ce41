"""Users, passwords, tokens and tickets on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from core4.config import Settings
from core4.database import Database
from core4.errors import BadRequest, Conflict, NotFound, TooManyRequests
from core4.jobs import utcnow
from core4.users import TOKEN, UserStore
from tests.helpers import eventually_async

PASSWORD = "secret"


@pytest.fixture
async def store(users: UserStore) -> UserStore:
    await users.add("Ann", PASSWORD, ["job://a/x"])
    return users


@pytest.fixture
async def other(database: Database, settings: Settings) -> AsyncIterator[UserStore]:
    """The same users in another process."""
    other = UserStore(database, settings)
    yield other
    other.close()


async def test_verify(store: UserStore) -> None:
    """The right password, whatever the case of the name, and nothing else."""
    user = await store.verify("ann", PASSWORD)

    assert user is not None
    assert (user.name, user.rights) == ("Ann", ("job://a/x",))
    assert await store.verify("Ann", "Secret") is None
    assert await store.verify("An", PASSWORD) is None
    assert await store.verify("nn", PASSWORD) is None
    assert await store.verify("", "") is None


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\0", "ä", "x" * 101, "a\n"])
async def test_bad_names(store: UserStore, name: str) -> None:
    """Names are plain, so that they fit into a header and a terminal."""
    with pytest.raises(BadRequest):
        await store.add(name, PASSWORD)


async def test_a_name_is_taken_in_any_case(store: UserStore) -> None:
    """Two users cannot differ in case only."""
    with pytest.raises(Conflict):
        await store.add("ANN", PASSWORD)


async def test_bad_rights_are_refused(store: UserStore) -> None:
    """A right that means nothing is not stored."""
    with pytest.raises(BadRequest, match="neither"):
        await store.add("bob", PASSWORD, ["everything"])

    assert await store.get("bob") is None


@pytest.mark.parametrize(("password", "fits"), [("x" * 72, True), ("x" * 73, False), ("ä" * 37, False)])
async def test_seventy_two_bytes(store: UserStore, password: str, fits: bool) -> None:
    """bcrypt reads 72 bytes: what is longer is refused when it is set, and never equal to its beginning."""
    if fits:
        await store.set_password("ann", password)
        assert await store.verify("ann", password)
    else:
        with pytest.raises(BadRequest, match="72 bytes"):
            await store.set_password("ann", password)
    assert await store.verify("ann", password + "x") is None


@pytest.mark.parametrize("password", ["", "a\0b", "\ud800", "x" * 1_000_000])
async def test_passwords_that_no_one_has(store: UserStore, password: str) -> None:
    """What cannot be a password is a wrong one, not an error."""
    assert await store.verify("ann", password) is None
    with pytest.raises(BadRequest):
        await store.set_password("ann", password)


async def test_one_check_however_many_ask(store: UserStore) -> None:
    """A thousand requests with one credential cost one check."""
    checks: list[None] = []
    found = await asyncio.gather(
        *(store.verify("ann", PASSWORD, before_check=lambda: checks.append(None)) for _ in range(1000))
    )

    assert all(found)
    assert len(checks) == 1


async def test_wrong_ones_are_checked_each_time(store: UserStore) -> None:
    """Only what was right is remembered."""
    checks: list[None] = []
    for _ in range(3):
        assert await store.verify("ann", "wrong", before_check=lambda: checks.append(None)) is None

    assert len(checks) == 3


async def test_too_many_at_once_are_turned_away(store: UserStore) -> None:
    """A flood of guesses does not pile up."""
    assert await store.verify("ann", "guess") is None  # the user is known now: none of them waits for that
    results = await asyncio.gather(
        *(store.verify("ann", f"guess {n}") for n in range(200)), return_exceptions=True
    )

    assert any(isinstance(result, TooManyRequests) for result in results)
    assert all(result is None or isinstance(result, TooManyRequests) for result in results)
    assert await store.verify("ann", PASSWORD)


async def test_a_changed_password_is_in_force_elsewhere(store: UserStore, other: UserStore) -> None:
    """Another process refuses the old password within seconds, although it had been right."""
    assert await other.verify("ann", PASSWORD)
    await store.set_password("ann", "new")

    async def refused() -> bool:
        return await other.verify("ann", PASSWORD) is None

    await eventually_async(refused, 5, what="the old password is refused")
    assert await other.verify("ann", "new")


@pytest.mark.row("S23")
async def test_a_disabled_user_is_out(store: UserStore, other: UserStore) -> None:
    """Neither password nor token opens anything; enabled again, the password does."""
    user = await other.verify("ann", PASSWORD)
    assert user is not None
    token, _ = await other.issue(user)
    assert await other.check(token)
    await store.disable("ann")

    async def out() -> bool:
        return await other.verify("ann", PASSWORD) is None and await other.check(token) is None

    await eventually_async(out, 5, what="the user is out")
    await store.disable("ann", active=True)
    assert await store.verify("ann", PASSWORD)
    assert await store.check(token) is None


async def test_unknown_users_cannot_be_changed(store: UserStore) -> None:
    """There is nothing to change."""
    with pytest.raises(NotFound):
        await store.disable("nobody")
    with pytest.raises(NotFound):
        await store.set_password("nobody", PASSWORD)


async def test_list(store: UserStore) -> None:
    """All users, by name."""
    assert [user.name for user in await store.list()] == ["admin", "Ann"]


async def test_tokens(store: UserStore, database: Database) -> None:
    """A token is whose it is until it is revoked; the database does not know it."""
    user = await store.get("ann")
    assert user is not None
    token, expires = await store.issue(user)

    found = await store.check(token)
    assert found is not None
    assert found.name == "Ann"
    assert expires > utcnow()
    assert token not in str(await database.collection(TOKEN).find({}).to_list(None))
    assert await store.revoke(token)
    assert await store.check(token) is None
    assert not await store.revoke(token)


async def test_expired_tokens(store: UserStore, database: Database) -> None:
    """What has expired opens nothing, and goes when the next one is made."""
    user = await store.get("ann")
    assert user is not None
    token, _ = await store.issue(user)
    tokens = database.collection(TOKEN)
    await tokens.update_many({}, {"$set": {"expires": utcnow() - timedelta(seconds=1)}})

    assert await store.check(token) is None
    await store.issue(user)
    assert await tokens.count_documents({}) == 1


async def test_refresh(store: UserStore, database: Database) -> None:
    """Past an eighth of its life a token earns a new one, the same for whoever asks again."""
    user = await store.get("ann")
    assert user is not None
    token, _ = await store.issue(user)
    accepted = await store.accept(token)
    assert accepted is not None
    assert await store.refresh(token, accepted) is None

    old = replace(accepted, created=accepted.created - timedelta(seconds=3000))
    fresh = await store.refresh(token, old)

    assert fresh is not None
    assert fresh != token
    assert await store.check(fresh)
    assert await store.refresh(token, old) == fresh


async def test_a_ticket_opens_once(store: UserStore, other: UserStore) -> None:
    """Of two that show the same ticket at the same time, in two processes, one gets in."""
    user = await store.get("ann")
    assert user is not None
    ticket, _ = await store.ticket(user)

    found = await asyncio.gather(*(each.redeem(ticket) for each in (store, other, store, other)))

    assert sum(user is not None for user in found) == 1
    assert await store.redeem(ticket) is None


async def test_tickets_and_tokens_are_different_things(store: UserStore) -> None:
    """Neither stands in for the other."""
    user = await store.get("ann")
    assert user is not None
    ticket, _ = await store.ticket(user)
    token, _ = await store.issue(user)

    assert await store.check(ticket) is None
    assert await store.redeem(token) is None
    assert await store.check(token)
