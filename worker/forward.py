"""Sends the records of return queues on to the message broker, into queues of the same names.

Any number of workers may do so: each record is taken on by one of them. One that dies between the broker's
answer and its note of it leaves a record that is sent once more, under the same message id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from pymongo.errors import PyMongoError

from core4 import returns
from core4.brokers import Broker, connector
from core4.changes import Change, Lookout, never
from core4.config import Settings
from core4.database import Database
from core4.errors import BrokerLost, Unavailable
from core4.returns import Returns
from core4.service import masked

log = logging.getLogger(__name__)

PORTION = 50  # records looked for at once
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0  # seconds until a broker that was lost is tried again

_TROUBLE = (PyMongoError, Unavailable, BrokerLost, TimeoutError, OSError)


class Forward:
    """Sends what is to be sent until it is cancelled."""

    def __init__(
        self, database: Database, settings: Settings, url: str, live: Callable[[], bool] = never
    ) -> None:
        self._returns, self._lookout = Returns(database), Lookout(live, settings.poll)
        self._connect = partial(connector(url), url, settings.broker_prefetch)
        self._sent = 0  # records, so far

    def hear(self, change: Change) -> None:
        """A change that may say that there is something to send."""
        if change.kind in ("insert", "resync"):
            self._lookout.hint()

    async def run(self) -> None:
        """Work on, through outages of the database and of the broker."""
        pause = 0.0
        while True:
            before = self._sent
            try:
                await self._serve()
            except _TROUBLE as error:
                log.warning("forward.interrupted", extra={"error": masked(str(error))[:300]})
            except Exception:  # another's broker may raise anything; the worker goes on
                log.exception("forward.failed")
            pause = FIRST_PAUSE if self._sent > before else min(max(pause * 2, FIRST_PAUSE), LAST_PAUSE)
            await asyncio.sleep(pause)

    async def _serve(self) -> None:
        """Until something fails."""
        # Nobody is connected to for nothing: most workers never have anything to send.
        while not await self._are_some():
            await self._lookout.wait()
        broker = await self._connect()
        try:
            while True:
                self._lookout.looking()
                if not await self.step(broker):
                    await self._lookout.wait()
        finally:
            await broker.close()

    async def _are_some(self) -> bool:
        self._lookout.looking()
        return bool(await self._returns.unsent(1))

    async def step(self, broker: Broker) -> int:
        """Send what is there now; how many records that was."""
        done = 0
        for record in await self._returns.unsent(PORTION):
            if not await self._returns.reserve(record):
                continue
            message_id = str(record["_id"])
            await broker.send(record["queue"], returns.body_of(record), message_id=message_id)
            await self._returns.sent(record["_id"])
            self._sent += 1
            done += 1
        return done
