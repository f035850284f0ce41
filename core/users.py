"""Who may sign in: users with their rights, bearer tokens and stream tickets.

Passwords are checked off the event loop. A password that was right is remembered for a minute, under a
key that contains the stored hash, so that a changed password is refused as soon as the user is read again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Generic, TypeVar

import bcrypt
from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from core4 import permissions
from core4.config import Settings
from core4.database import Database, Document
from core4.errors import BadRequest, Conflict, NotFound, TooManyRequests
from core4.jobs import utcnow
from core4.permissions import Rights
from core4.remembered import Remembered

ROLE, TOKEN = "sys.role", "sys.token"
INDEXES = {
    ROLE: (IndexModel([("name_lower", 1)], name="name_lower", unique=True),),
    TOKEN: (
        IndexModel([("name_lower", 1)], name="name_lower"),
        IndexModel([("expires", 1)], name="expires"),
    ),
}

NAME = re.compile(r"[A-Za-z0-9._@+-]{1,100}")
PASSWORD_BYTES = 72  # bcrypt reads no more
REMEMBER = 60.0  # seconds a right password is not checked again
REREAD = 2.0  # seconds after which a user is read again: what an operator changes is in force by then
TICKET_LIFE = 60.0  # seconds
_REMEMBERED = 10_000  # passwords, users and tokens held in memory
_WAITING = 64  # password checks in line before more are turned away

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class User:
    """Who is signed in, with the rights as they are now."""

    name: str
    rights: tuple[str, ...]
    is_active: bool
    auth_version: int
    document: Document

    @property
    def may(self) -> Rights:
        """The compiled rights."""
        return Rights.of(self.rights)


@dataclass(frozen=True)
class Token:
    """A bearer token that was accepted: whose it is and when it was made."""

    user: User
    created: datetime
    expires: datetime


class UserStore:
    """The only writer of `sys.role` and `sys.token`. One object per process: it remembers."""

    def __init__(self, database: Database, settings: Settings | None = None) -> None:
        self._database = database
        self._settings = settings or Settings()
        self._roles = database.collection(ROLE)
        self._tokens = database.collection(TOKEN)
        self._secret = secrets.token_bytes(32)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="bcrypt")
        self._dummy = ""
        self._checks: dict[bytes, asyncio.Future[bool]] = {}
        self._right = _Memory[bytes, bool](REMEMBER)
        # One look for all that a user sends at the same time.
        self._users = Remembered(self.get, lambda: REREAD)
        self._fresh = _Memory[str, tuple[str, datetime]](self._settings.token_ttl)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    def close(self) -> None:
        """End the threads that check passwords."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ users

    async def add(self, name: str, password: str, allow: Sequence[str] = ()) -> User:
        """A new user with these rights.

        Raises: BadRequest if name, password or a right is not accepted; Conflict if the name is taken.
        """
        if not NAME.fullmatch(name):
            raise BadRequest("a user's name has 1 to 100 of A-Z a-z 0-9 . _ @ + -")
        Rights.of(allow)
        now = utcnow()
        document: Document = {
            "name": name,
            "name_lower": name.lower(),
            "password": await self._hash(password),
            "perm": list(allow),
            "is_active": True,
            "auth_version": 1,
            "created": now,
            "updated": now,
        }
        try:
            await self._roles.insert_one(document)
        except DuplicateKeyError:
            raise Conflict(f"user [{name}] exists") from None
        return _user(document)

    async def get(self, name: str) -> User | None:
        """The user of this name as stored now, whatever the case of its letters."""
        document = await self._roles.find_one({"name_lower": name.lower()})
        return _user(document) if document else None

    async def list(self) -> list[User]:
        """All users by name."""
        documents = await self._roles.find({}).to_list(None)
        return sorted(map(_user, documents), key=lambda user: user.name.lower())

    async def set_password(self, name: str, password: str) -> None:
        """Change a password; what was signed in with the old one is refused within five seconds.

        Raises: BadRequest, NotFound.
        """
        await self._change(name, {"password": await self._hash(password)})

    async def set_rights(self, name: str, allow: Sequence[str]) -> None:
        """Give a user these rights instead of those before.

        Raises: BadRequest, NotFound.
        """
        for right in allow:
            permissions.check(right)
        await self._change(name, {"perm": list(allow)})

    async def disable(self, name: str, *, active: bool = False) -> None:
        """Lock a user out, or let in again with ``active=True``.

        Raises: NotFound.
        """
        await self._change(name, {"is_active": active})

    async def _change(self, name: str, fields: Document) -> None:
        key = name.lower()
        result = await self._roles.update_one(
            {"name_lower": key}, {"$set": {**fields, "updated": utcnow()}, "$inc": {"auth_version": 1}}
        )
        if not result.matched_count:
            raise NotFound(f"user [{name}] not found")
        self._users.forget()

    # ------------------------------------------------------------------ passwords

    async def verify(
        self, name: str, password: str, *, before_check: Callable[[], None] = lambda: None
    ) -> User | None:
        """The user, if name and password are right; None whatever was wrong, after the same time.

        Args:
            before_check: called before a password is really checked, not for one that was right a
                moment ago; what it raises ends the call.

        Raises: TooManyRequests if too many passwords wait to be checked.
        """
        user = await self._remembered(name)
        if user is None or not _usable(password):
            await self._check(secrets.token_bytes(16), "-", await self._dummy_hash(), before_check)
            return None
        key = self._key(user.document, password)
        if not self._right.get(key):
            if not await self._check(key, password, user.document["password"], before_check):
                return None
            self._right.put(key, True)
        return user if user.is_active else None

    async def _check(self, key: bytes, password: str, hashed: str, before_check: Callable[[], None]) -> bool:
        """Check once however many ask for the same at the same time."""
        check = self._checks.get(key)
        if check is None:
            if len(self._checks) >= _WAITING:
                raise TooManyRequests(1.0, "too many sign-ins wait, try again")
            before_check()
            loop = asyncio.get_running_loop()
            check = loop.run_in_executor(self._pool, bcrypt.checkpw, password.encode(), hashed.encode())
            self._checks[key] = check
            check.add_done_callback(lambda _: self._checks.pop(key, None))
        # Whoever hangs up must not cancel the check the others wait for.
        return await asyncio.shield(check)

    def _key(self, document: Document, password: str) -> bytes:
        """Names one credential without holding it; no two of them share a text."""
        name, hashed = document["name_lower"], document["password"]
        text = f"{len(name)} {len(password)} {name}{password}{hashed}"
        return hashlib.blake2b(text.encode(), key=self._secret, digest_size=32).digest()

    async def _hash(self, password: str) -> str:
        if not password or not _usable(password):
            raise BadRequest(f"a password has 1 to {PASSWORD_BYTES} bytes in UTF-8 and no NUL")
        return await self._hashed(password)

    async def _hashed(self, password: str) -> str:
        loop = asyncio.get_running_loop()
        cost = self._settings.bcrypt_cost
        hashed = await loop.run_in_executor(
            self._pool, lambda: bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost))
        )
        return hashed.decode()

    async def _dummy_hash(self) -> str:
        # Checked for unknown users, so that time does not tell which names exist.
        self._dummy = self._dummy or await self._hashed(secrets.token_hex(16))
        return self._dummy

    async def _remembered(self, name: str) -> User | None:
        return await self._users.get(name.lower()) if NAME.fullmatch(name) else None

    # ------------------------------------------------------------------ tokens

    async def issue(self, user: User) -> tuple[str, datetime]:
        """A new bearer token and when it expires. Only its hash is stored."""
        return await self._store(user, "bearer", self._settings.token_ttl)

    async def ticket(self, user: User) -> tuple[str, datetime]:
        """A ticket that opens one stream within a minute."""
        return await self._store(user, "ticket", TICKET_LIFE)

    async def _store(self, user: User, kind: str, life: float) -> tuple[str, datetime]:
        now = utcnow()
        text = secrets.token_urlsafe(32)
        expires = now + timedelta(seconds=life)
        key = user.name.lower()
        await self._tokens.delete_many({"name_lower": key, "expires": {"$lt": now}})
        await self._tokens.insert_one(
            {
                "_id": _fingerprint(text),
                "kind": kind,
                "name_lower": key,
                "auth_version": user.auth_version,
                "created": now,
                "expires": expires,
            }
        )
        return text, expires

    async def forget_tokens(self) -> int:
        """Delete tokens and tickets that have expired, whoever had them; how many."""
        return (await self._tokens.delete_many({"expires": {"$lt": utcnow()}})).deleted_count

    async def check(self, token: str) -> User | None:
        """The user of a bearer token that is valid now."""
        accepted = await self.accept(token)
        return accepted.user if accepted else None

    async def accept(self, token: str) -> Token | None:
        """A bearer token that is valid now, with its age."""
        return await self._accepted(await self._tokens.find_one({"_id": _fingerprint(token)}), "bearer")

    async def redeem(self, ticket: str) -> User | None:
        """The user of a ticket; the second time there is none."""
        key = _fingerprint(ticket)
        document = await self._tokens.find_one({"_id": key})
        accepted = await self._accepted(document, "ticket")
        if accepted is None:
            return None
        deleted = await self._tokens.delete_one({"_id": key})
        return accepted.user if deleted.deleted_count else None

    async def _accepted(self, document: Document | None, kind: str) -> Token | None:
        if document is None or document["kind"] != kind or document["expires"] <= utcnow():
            return None
        owner = await self._remembered(document["name_lower"])
        if owner is None or not owner.is_active or owner.auth_version != document["auth_version"]:
            return None
        return Token(owner, document["created"], document["expires"])

    async def refresh(self, token: str, accepted: Token) -> str | None:
        """A fresh token for one that is past an eighth of its life; the same one however often asked."""
        if utcnow() - accepted.created < (accepted.expires - accepted.created) / 8:
            return None
        key = _fingerprint(token)
        known = self._fresh.get(key)
        if known is None or known[1] <= utcnow() + timedelta(seconds=self._settings.token_ttl / 2):
            known = await self.issue(accepted.user)
            self._fresh.put(key, known)
        return known[0]

    async def use_once(self, word: str, life: float) -> bool:
        """Note that this word was used; False if it was before, within `life` seconds."""
        now = utcnow()
        used = {"_id": _fingerprint(word), "kind": "challenge", "created": now}
        try:
            await self._tokens.insert_one({**used, "expires": now + timedelta(seconds=2 * life)})
        except DuplicateKeyError:
            return False
        return True

    async def revoke(self, token: str) -> bool:
        """End a bearer token at once; False if there was none."""
        deleted = await self._tokens.delete_one({"_id": _fingerprint(token)})
        return bool(deleted.deleted_count)


class _Memory(Generic[K, V]):
    """A dictionary that forgets: what is older than `life` seconds, and the oldest beyond a limit."""

    def __init__(self, life: float) -> None:
        self._life = life
        self._items: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get(self, key: K) -> V | None:
        kept = self._items.get(key)
        return kept[1] if kept is not None and monotonic() - kept[0] < self._life else None

    def put(self, key: K, value: V) -> None:
        self._items.pop(key, None)
        self._items[key] = (monotonic(), value)
        if len(self._items) > _REMEMBERED:
            self._items.popitem(last=False)

    def forget(self, key: K) -> None:
        self._items.pop(key, None)


def _user(document: Document) -> User:
    return User(
        name=document["name"],
        rights=tuple(document["perm"]),
        is_active=document["is_active"],
        auth_version=document["auth_version"],
        document=document,
    )


def _usable(password: str) -> bool:
    """True for what bcrypt can tell apart from every other password."""
    try:
        return "\0" not in password and len(password.encode()) <= PASSWORD_BYTES
    except UnicodeEncodeError:
        return False


def _fingerprint(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
