"""The database that most tests use: of the indexes only those that an answer depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pymongo import IndexModel

from core4.database import Database


class SmallDatabase(Database):
    """A database of a few documents: of its indexes only those are made that refuse something.

    The others make no answer different, and the embedded server reads up on all of them for each write.
    With `every_index` all are made: the installed programs do, the tests of the claim and of the doctor.
    """

    every_index = False

    async def ensure_indexes(self, indexes: Mapping[str, Sequence[IndexModel]]) -> None:
        """Make what is missing of `indexes`, or of the unique ones of them."""
        for collection, models in indexes.items():
            if made := [model for model in models if self.every_index or model.document.get("unique")]:
                await super().ensure_indexes({collection: made})


class PatientDatabase(SmallDatabase):
    """What is done beside waits until somebody waits for it: each run makes the same writes in one order."""

    async def pause(self, seconds: float) -> None:
        """Wait as long as it takes."""
        await super().pause(600)
