"""The functions that were shipped: one action per source, however many jobs call it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from core4 import sources
from core4.database import Database, Document, Page
from core4.errors import Conflict, NotFound, SourceRefused
from core4.jobs import utcnow
from core4.sources import Source

ACTION = "sys.action"
INDEXES = {
    ACTION: (
        IndexModel([("methodname", 1)], name="methodname"),
        IndexModel([("used_at", 1)], name="used_at"),
    )
}
FRESH = timedelta(minutes=1)  # a use that is younger is not noted again


class ActionStore:
    """The only writer of `sys.action`; `_id` is the SHA-256 of the source, so that one source is one action.

    Each user who submits it has a signature of his own there: nobody can spoil that of another.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._actions = database.collection(ACTION)

    async def prepare(self) -> None:
        """Make the indexes that are missing; the one on the hash is the collection's own."""
        await self._database.ensure_indexes(INDEXES)

    async def put(
        self, source: Source, *, by: str, signer: str, signature: str, actorname: str = ""
    ) -> tuple[Document, bool]:
        """Store a source under its hash, once, with this user's signature; whether it is new.

        Raises: Conflict if it has been revoked.
        """
        mine, now = signature_path(by), utcnow()
        entry = {"by": by, "signer": signer, "signature": signature}
        known = await self._actions.find_one({"_id": source.key})
        if known is not None and _is_noted(known, mine, entry, now):
            return _usable(known), False
        made: Document = {
            "methodname": source.method,
            "actorname": actorname,
            "code": source.code,
            "created": now,
            "created_by": by,
            "revoked": None,
        }
        for _ in range(2):
            try:
                await self._actions.update_one(
                    {"_id": source.key, "revoked": None},
                    {"$set": {mine: entry, "used_at": now}, "$setOnInsert": made},
                    upsert=True,
                )
                break
            except DuplicateKeyError:
                # Somebody stored it in this moment, and now it is an update; or it is revoked.
                _usable(await self.get(source.key))
        return await self.get(source.key), known is None

    async def get(self, key: str) -> Document:
        """The action of this hash.

        Raises: NotFound.
        """
        found = await self._actions.find_one({"_id": key})
        if found is None:
            raise NotFound(f"action [{key:.100}] not found")
        return found

    async def granted(self, function: Mapping[str, Any]) -> Document | None:
        """What `verified` needs of the action that a job calls, and nothing of others; None if it is gone.

        Args:
            function: what the job says of it.
        """
        mine = signature_path(str(function["by"]))
        return await self._actions.find_one({"_id": str(function["key"])}, {"code": 1, "revoked": 1, mine: 1})

    async def page(self, where: Mapping[str, Any], *, page: int, per_page: int) -> Page:
        """One page of the actions, newest first, without their code."""
        total = await self._actions.count_documents(dict(where))
        pages = -(-total // per_page)
        number = pages + page if page < 0 else page
        if not 0 <= number < max(pages, 1):
            return Page([], total, page, per_page)
        rows = self._actions.find(dict(where), {"code": 0, "signatures": 0}).sort("created", -1)
        found = await rows.skip(number * per_page).limit(per_page).to_list(None)
        return Page(found, total, page, per_page)

    async def methods(self) -> list[str]:
        """The names of all functions that were shipped."""
        return [str(name) for name in await self._actions.distinct("methodname")]

    async def revoke(self, key: str, *, by: str, reason: str | None = None) -> Document:
        """Let an action run no more, whoever signed for it; again changes nothing.

        Raises: NotFound.
        """
        note = {"at": utcnow(), "by": by, "reason": reason}
        await self._actions.update_one({"_id": key, "revoked": None}, {"$set": {"revoked": note}})
        return await self.get(key)

    async def forgettable(self, before: datetime, limit: int) -> list[str]:
        """Up to `limit` keys of what nobody has used since then; what was revoked stays so."""
        where = {"used_at": {"$lt": before}, "revoked": None}
        rows = await self._actions.find(where, {"_id": 1}).limit(limit).to_list(None)
        return [str(row["_id"]) for row in rows]

    async def forget(self, keys: Collection[str], before: datetime) -> int:
        """Delete those of these that have not been used since then; how many."""
        where = {"_id": {"$in": list(keys)}, "used_at": {"$lt": before}, "revoked": None}
        return (await self._actions.delete_many(where)).deleted_count


def signature_path(by: str) -> str:
    """Where in an action the signature of this user is; names may hold what paths must not."""
    return f"signatures.{hashlib.sha256(by.lower().encode()).hexdigest()[:16]}"


def verified(action: Mapping[str, Any], function: Mapping[str, Any], keys: Mapping[str, str]) -> Source:
    """The source that a job may run: what the action holds is what its user's key signed, and is not revoked.

    Args:
        function: what the job says of it: key, by, signer.
        keys: the secrets of the signers that are trusted, by name.

    Raises: SourceRefused.
    """
    key, code = str(function["key"]), str(action["code"])
    if action.get("revoked"):
        told = action["revoked"]
        raise SourceRefused(f"action [{key}] was revoked by {told['by']}" + _because(told))
    if sources.key_of(code) != key or action["_id"] != key:
        raise SourceRefused(f"action [{key}] has been changed: its source has another hash")
    name = str(function["signer"])
    if name not in keys:
        raise SourceRefused(f"this worker does not trust the key [{name}]")
    _, _, mine = signature_path(str(function["by"])).partition(".")
    entry = (action.get("signatures") or {}).get(mine) or {}
    if entry.get("signer") != name or not sources.is_signed(keys[name], code, str(entry.get("signature"))):
        raise SourceRefused(f"the signature of [{name}] under action [{key}] is wrong")
    found = sources.stored(code)
    if found.method != function["method"]:
        raise SourceRefused(f"action [{key}] is no source of [{function['method']}]")
    return found


def view(action: Mapping[str, Any], *, code: bool = True) -> Document:
    """An action as readers get it."""
    names = ("methodname", "actorname", "created", "created_by", "used_at", "revoked")
    shown: Document = {"key": action["_id"], **{name: action.get(name) for name in names}}
    if code:
        shown["code"] = action["code"]
        shown["signatures"] = [
            {"by": each["by"], "signer": each["signer"]} for each in (action.get("signatures") or {}).values()
        ]
    return shown


def _is_noted(known: Document, path: str, entry: Document, now: datetime) -> bool:
    _, _, mine = path.partition(".")
    fresh = now - known["used_at"] < FRESH
    return bool(known["revoked"]) or (fresh and (known.get("signatures") or {}).get(mine) == entry)


def _usable(action: Document) -> Document:
    if told := action["revoked"]:
        raise Conflict(f"action [{action['_id']}] was revoked by {told['by']}{_because(told)}")
    return action


def _because(told: Mapping[str, Any]) -> str:
    return f": {told['reason']}" if told.get("reason") else ""
