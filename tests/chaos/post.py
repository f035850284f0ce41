"""Messages in a chaos run: a RabbitMQ that is stopped and cut off, wishes for jobs, repeats and nonsense."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import aio_pika

from core4.database import Database
from core4.errors import BrokerLost
from core4.producers import Producer
from tests.chaos.evidence import History
from tests.rabbit import Cutter, Rabbit, make_queue, put, taken

QUEUE, NAME = "DEFAULT", "tests.chaos.Job"
EVERY_TENTH, EVERY_TWENTIETH = 10, 20  # is sent twice; is followed by nonsense
CUTS = 8  # of all connections, spread over the messages; in the middle the broker is stopped
PAUSE = 0.3  # seconds between two tries


class Post(threading.Thread):
    """Starts a broker, sends messages until each is confirmed, and disturbs the broker meanwhile."""

    def __init__(self, home: Path, messages: int, history: History, ledger: str) -> None:
        super().__init__(daemon=True)
        self._messages, self._history, self._ledger = messages, history, ledger
        self.rabbit = Rabbit(home / "rabbit")
        self._cutter = Cutter(self.rabbit.port)
        self.url = f"amqp://guest:guest@127.0.0.1:{self._cutter.port}/"
        self.ids = [f"m{number}" for number in range(messages)]
        self.malformed = frozenset(f"bad{number}" for number in range(0, messages, EVERY_TWENTIETH))
        self.cuts = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.rabbit.start()
            asyncio.run(self._send_all())
        except BaseException as error:  # shown by the run
            self.failure = error

    async def _send_all(self) -> None:
        await make_queue(self.rabbit.url, QUEUE)
        async with Producer(self.url, QUEUE) as producer:
            for number, message_id in enumerate(self.ids):
                await self._disturb(number)
                for _ in range(2 if number % EVERY_TENTH == 0 else 1):
                    await self._send(producer, message_id)
                if number % EVERY_TWENTIETH == 0:
                    await self._send_nonsense(f"bad{number}")

    async def _disturb(self, number: int) -> None:
        if number == self._messages // 2:
            await asyncio.to_thread(self.rabbit.stop_app)
            await asyncio.to_thread(self.rabbit.start_app)
        if number % max(self._messages // CUTS, 1) == 0:
            self.cuts += await asyncio.to_thread(self._cutter.cut)

    async def _send(self, producer: Producer, message_id: str) -> None:
        args = {"key": message_id, "ledger": self._ledger, "seconds": 0.05}
        while True:
            number = self._history.invoke("post", "message", message_id)
            try:
                await producer.send_job({"name": NAME, "kwargs": args, "request_id": message_id})
            except BrokerLost as error:
                self._history.answer(number, "info", str(error)[:200])
                await asyncio.sleep(PAUSE)
            else:
                self._history.answer(number, "ok", message_id)
                return

    async def _send_nonsense(self, message_id: str) -> None:
        while True:
            try:
                return await put(self.url, QUEUE, b"{", ids=[message_id])
            except (OSError, TimeoutError, aio_pika.exceptions.AMQPError):
                await asyncio.sleep(PAUSE)

    async def taken_in(self, database: Database) -> bool:
        """True when every message has become a job; the checker says which has not."""
        tables = [database.collection(name) for name in ("sys.queue", "sys.journal")]
        where = {"request_id": {"$in": self.ids}}
        found = {row["request_id"] for table in tables for row in await table.find(where).to_list(None)}
        return len(found) == len(self.ids)

    async def dead(self) -> frozenset[str]:
        """The ids of the dead letters, out of their place."""
        return frozenset(str(each.message_id) for each in await taken(self.rabbit.url, f"{QUEUE}.dead"))

    def stop(self) -> None:
        """End the broker."""
        self._cutter.close()
        self.rabbit.stop()
