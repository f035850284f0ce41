"""What a healthy process does after others died, and the evidence that is left then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from core4.database import Database
from core4.events import audit_of
from tests.chaos.client import Actor
from tests.chaos.evidence import Document, Evidence, read_history, read_ledger

ROUNDS = 60  # of upkeep and work until everything is final; far more than any case needs


async def bury_others(actor: Actor) -> None:
    """Declare everybody dead, without waiting for it. The actor registers afterwards."""
    await actor.registry.bury(-3600)


async def recover(actor: Actor) -> None:
    """Bring every job to its end; raises AssertionError if that does not come.

    The actor has to be registered, and whoever is dead has to be buried.
    """
    for _ in range(ROUNDS):
        await actor.force_due()
        await actor.upkeep()
        await actor.run_all()
        if await _is_still(actor.database):
            return
    dump = await dumped(actor.database)
    raise AssertionError(f"not drained: {[row for row in dump['queue'] if not _is_at_rest(row)]}")


async def _is_still(database: Database) -> bool:
    dump = await dumped(database)
    return all(map(_is_at_rest, dump["queue"])) and not any(row.get("settle") for row in dump["journal"])


def _is_at_rest(document: Document) -> bool:
    return document["state"] in ("error", "killed", "inactive", "complete") and not document.get("settle")


async def all_told(actor: Actor) -> None:
    """Every action that a job's document tells has its line in the audit; AssertionError if not."""
    for table in ("sys.queue", "sys.journal"):
        for document in await actor.database.collection(table).find({"decoy": None}).to_list(None):
            told = await actor.events.page({"job_id": str(document["_id"])}, per_page=500)
            missing = {line["_id"] for line in audit_of(document)} - {row["_id"] for row in told.rows}
            assert not missing, f"not told: {missing}"


async def dumped(database: Database) -> dict[str, list[dict[str, Any]]]:
    """The collections that the checker reads."""
    names = ("queue", "journal", "log", "worker", "schedule")
    found = await asyncio.gather(
        *(database.collection(f"sys.{name}").find({}).to_list(None) for name in names)
    )
    return dict(zip(names, found, strict=True))


async def gathered(database: Database, history: Path, ledger: Path, **more: Any) -> Evidence:
    """All the evidence of a run without followers."""
    dump = await dumped(database)
    return Evidence(
        operations=read_history(history),
        ledger=read_ledger(ledger),
        queue=dump["queue"],
        journal=dump["journal"],
        log=dump["log"],
        workers=dump["worker"],
        **more,
    )
