"""Makes the jobs that are due by their schedules. Any number of schedulers may run: none leads.

See core4.schedules for why they neither double nor miss an instant.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from pymongo.errors import ConnectionFailure, PyMongoError

from core4 import schedules
from core4.catalogue import Catalogue
from core4.changes import Change, Lookout, never
from core4.config import Settings
from core4.controls import Controls
from core4.database import Database
from core4.errors import BadOption, NotFound, Unavailable
from core4.queues import JobQueue
from core4.schedules import Clock, Decision, Schedule, ScheduleStore

log = logging.getLogger(__name__)

MEASURE = 30.0  # seconds between two looks at the server's clock


class ServerClock:
    """The time of the database server, without asking it each time. Never ahead of it."""

    def __init__(self, database: Database, *, every: float = MEASURE) -> None:
        self._database = database
        self._every = every
        self._seen: tuple[datetime, float] | None = None

    async def __call__(self) -> datetime:
        """Raises: PyMongoError if the server has to be asked and does not answer."""
        if self._seen is None or time.monotonic() - self._seen[1] > self._every:
            # The time of the reply is counted as if it were still to come: too early at most.
            self._seen = await self._database.server_time(), time.monotonic()
        server, measured = self._seen
        return server + timedelta(seconds=time.monotonic() - measured)


async def unpaused() -> bool:
    """`paused` of a scheduler that nobody pauses."""
    return False


class Scheduler:
    """Fires what is due and sleeps until the next instant.

    Args:
        clock: the time that counts; for all schedulers the same, so the server's.
        paused: asked before each step; while true nothing is fired or skipped, afterwards each schedule
            makes up for it as for a downtime.
        held: whether the jobs of this name are paused; the same for their schedules.
        poll: longest sleep in seconds: a changed schedule is seen after this time unless `wake` is called.
        live: whether `wake` is called for all changes just now; then it may sleep longer.
    """

    def __init__(
        self,
        schedules: ScheduleStore,
        queue: JobQueue,
        catalogue: Catalogue,
        clock: Clock,
        *,
        paused: Callable[[], Awaitable[bool]] = unpaused,
        held: Callable[[str], bool] = lambda name: False,
        poll: float = 1.0,
        live: Callable[[], bool] = never,
    ) -> None:
        self._schedules = schedules
        self._queue = queue
        self._catalogue = catalogue
        self._clock = clock
        self._paused = paused
        self._held = held
        self._poll = poll
        self._lookout = Lookout(live, poll)
        self._broken: dict[str, int] = {}

    @classmethod
    def of_worker(
        cls,
        database: Database,
        settings: Settings,
        queue: JobQueue,
        controls: Callable[[], Controls],
        live: Callable[[], bool] = never,
    ) -> Scheduler:
        """The scheduler that a worker runs beside its jobs; `controls` tells what operators hold back."""

        async def paused() -> bool:
            return controls().everything is not None

        def held(name: str) -> bool:
            return controls().of_name(name) is not None

        store, clock = ScheduleStore(database), ServerClock(database)
        return cls(
            store,
            queue,
            Catalogue(database),
            clock,
            paused=paused,
            held=held,
            poll=settings.poll,
            live=live,
        )

    def hear(self, change: Change) -> None:
        """A hint that the schedules have changed; an update only tells that one has fired."""
        if change.kind != "update":
            self.wake()

    def wake(self) -> None:
        """Something has changed: look now."""
        self._lookout.hint()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; outlives outages of the database."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                self._lookout.looking()
                await self._step_and_expect()
                woken = asyncio.ensure_future(self._lookout.wait())
                await asyncio.wait({stopped, woken}, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
        finally:
            stopped.cancel()

    async def _step_and_expect(self) -> None:
        """One step; when it has to be followed by another is known to the lookout."""
        try:
            due = await self.step()
            if due is not None:
                self._lookout.expect((due - await self._clock()).total_seconds())
            return
        except (PyMongoError, Unavailable) as error:
            log.warning("scheduler.interrupted", extra={"error": str(error)[:200]})
        except Exception:
            log.exception("scheduler.failed")  # the next step may see what to do; the daemon goes on
        self._lookout.expect(self._poll)

    async def step(self) -> datetime | None:
        """Do what is due now; the next instant of any schedule, None if there is none.

        Raises: PyMongoError, Unavailable if the database does not answer. All that was not done is
        found again by the next step, of this scheduler or another.
        """
        if await self._paused():
            return None
        # The time is read before the schedules: whatever changed them since comes after it.
        now = await self._clock()
        every = await self._schedules.all()
        active = [each for each in every if each.active and not self._held(each.qual_name)]
        random.shuffle(active)  # schedulers that start together share the work
        following = [await self._attend(schedule, now) for schedule in active]
        return min((due for due in following if due is not None), default=None)

    async def _attend(self, schedule: Schedule, now: datetime) -> datetime | None:
        """Do what is due of one schedule; its next instant. What is wrong with it stops no other."""
        try:
            due = schedule.due()
            return due if due > now else await self._catch_up(schedule.name, now)
        except NotFound:
            return None  # deleted meanwhile
        except BadOption as error:
            self._report_broken(schedule, error)
        except (ConnectionFailure, Unavailable):
            raise
        except Exception:
            log.critical("schedule.failed", extra={"schedule": schedule.name}, exc_info=True)
        return None

    def _report_broken(self, schedule: Schedule, error: BadOption) -> None:
        """Once per revision: it is looked at every second."""
        if self._broken.get(schedule.name) == schedule.rev:
            return
        self._broken[schedule.name] = schedule.rev
        log.error("schedule.broken", extra={"schedule": schedule.name, "error": error.detail})

    async def _catch_up(self, name: str, now: datetime) -> datetime | None:
        while True:
            # Read again: another scheduler may have been here, or an operator.
            schedule = await self._schedules.get(name)
            if not schedule.active or self._held(schedule.qual_name) or await self._paused():
                return None
            decision = schedules.decide(schedule, now)
            if decision is None:
                return schedule.due()
            await self._carry_out(schedule, decision)

    async def _carry_out(self, schedule: Schedule, decision: Decision) -> None:
        """The jobs first, then the cursor: dying in between, the next one finds the jobs made."""
        refused = await self._fire(schedule, decision.fire)
        fired = [instant for instant in decision.fire if instant not in refused]
        skipped = sorted([*decision.skip, *refused])
        reason = next(iter(refused.values()), f"missed ({schedule.missed})")
        moved = await self._schedules.advance(
            schedule, decision.cursor, fired=fired, skipped=skipped, reason=reason
        )
        if not moved:
            return  # another scheduler was faster, and tells it
        for instant in fired:
            job_id = str(schedules.fire_id(schedule.name, instant))
            log.info(
                "schedule.fired",
                extra={"schedule": schedule.name, "instant": instant.isoformat(), "job_id": job_id},
            )
        if skipped:
            log.warning(
                "schedule.skipped",
                extra={
                    "schedule": schedule.name,
                    "count": len(skipped),
                    "first": skipped[0].isoformat(),
                    "last": skipped[-1].isoformat(),
                    "reason": reason,
                },
            )

    async def _fire(self, schedule: Schedule, instants: Sequence[datetime]) -> dict[datetime, str]:
        """Make the jobs; those that cannot be made, with the reason."""
        if not instants:
            return {}
        entry = await self._catalogue.get(schedule.qual_name)
        if entry is None:
            return dict.fromkeys(instants, f"no worker has published [{schedule.qual_name}]")
        if errors := schedules.misfit(schedule, entry):
            first = f"{errors[0]['pointer']}: {errors[0]['message']}"
            return dict.fromkeys(instants, f"the arguments do not fit: {first}"[:200])
        refused = {}
        for instant in instants:
            try:
                await schedules.fire(self._queue, entry, schedule, instant)
            except (PyMongoError, Unavailable):
                raise
            except Exception as error:  # the same the next time: told, counted and not in the way
                log.critical("schedule.refused", extra={"schedule": schedule.name}, exc_info=True)
                refused[instant] = f"refused: {str(error)[:200]}"
        return refused
