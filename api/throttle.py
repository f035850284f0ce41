"""How much somebody may ask of one API process: token buckets and counters in memory."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from time import monotonic
from weakref import WeakValueDictionary

from core4.errors import TooManyRequests, Unavailable

PERIOD = 300.0  # seconds in which all wrong passwords are forgiven
# Wrong passwords in that time; many may share an address, and one of them must not lock out the others.
PER_USER, PER_ADDRESS = 10, 100
SEAT_WAIT = 5.0  # seconds after which to ask again for one
_BUCKETS = 10_000  # kept; the one not used for longest goes first


class Throttle:
    """`size` tries per key, refilled evenly within `period` seconds."""

    def __init__(
        self, size: int = 10, period: float = 300.0, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._size, self._rate, self._clock = float(size), size / period, clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def wait(self, key: Hashable) -> float:
        """The seconds until there is a try, 0 if there is one."""
        return max(1 - self._left(key), 0.0) / self._rate

    def take(self, key: Hashable) -> float:
        """Use one try; the seconds until there is one if there is none, else 0."""
        left = self._left(key)
        if left < 1:
            return (1 - left) / self._rate
        self._put(key, left - 1)
        return 0.0

    def give_back(self, key: Hashable) -> None:
        """The try was a good one and does not count."""
        self._put(key, min(self._left(key) + 1, self._size))

    def _left(self, key: Hashable) -> float:
        left, at = self._buckets.get(key, (self._size, 0.0))
        return min(left + (self._clock() - at) * self._rate, self._size)

    def _put(self, key: Hashable, left: float) -> None:
        self._buckets.pop(key, None)
        self._buckets[key] = (left, self._clock())
        if len(self._buckets) > _BUCKETS:
            self._buckets.popitem(last=False)


class SignIns:
    """Guesses at passwords: so many per user, wherever they come from, and so many per address.

    An address from which a user has signed in has guesses of its own for that user: whoever guesses elsewhere
    does not lock the owner out.
    """

    def __init__(self) -> None:
        self._users, self._addresses = Throttle(PER_USER, PERIOD), Throttle(PER_ADDRESS, PERIOD)
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._told = Throttle(PER_USER, PERIOD)

    def take(self, name: str, address: str) -> None:
        """Use one guess of both.

        Raises: TooManyRequests; then none is used.
        """
        wait = max(self._users.wait(self._key(name, address)), self._addresses.wait(address))
        if wait:
            raise TooManyRequests(wait, "too many wrong passwords, try again later")
        self._users.take(self._key(name, address))
        self._addresses.take(address)

    def give_back(self, name: str, address: str) -> None:
        """The guess was a good one and does not count."""
        self._users.give_back(self._key(name, address))
        self._addresses.give_back(address)
        self._known[name, address] = None
        self._known.move_to_end((name, address))
        if len(self._known) > _BUCKETS:
            self._known.popitem(last=False)

    def is_news(self) -> bool:
        """True if a wrong guess is to be noted: so many, that strangers do not fill the audit."""
        return not self._told.take("all")

    def _key(self, name: str, address: str) -> Hashable:
        return (name, address) if (name, address) in self._known else name


class Seats:
    """The open streams and the requests that wait: so many in this process, and so many of one user."""

    def __init__(self, most: int, per_user: int) -> None:
        self._most, self._per_user = most, per_user
        self._taken: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """How many are taken."""
        return self._taken.total()

    def check(self, user: str, **facts: str) -> None:
        """Whether there is one for this user now; `facts` go with the refusal.

        Raises: TooManyRequests, Unavailable.
        """
        if self._taken[user] >= self._per_user:
            refusal = TooManyRequests(
                SEAT_WAIT, f"user [{user}] has {self._per_user} open streams or waiting requests: close some"
            )
            refusal.facts |= facts
            raise refusal
        if self.open >= self._most:
            text = f"this process has {self._most} open streams and waiting requests, try again later"
            raise Unavailable(text, retry_after=SEAT_WAIT, **facts)

    def taken(self, user: str, **facts: str) -> _Seat:
        """Have one within the block. Raises: as `check`."""
        self.check(user, **facts)
        return _Seat(self._taken, user)


class Turns:
    """Who asks for much at a time waits for himself: so many large answers of one user are under way."""

    def __init__(self, per_user: int) -> None:
        self._per_user = per_user
        self._users: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, user: str) -> asyncio.Semaphore:
        """What to enter for one more."""
        turns = self._users.get(user)
        if turns is None:
            turns = self._users[user] = asyncio.Semaphore(self._per_user)
        return turns


class _Seat:
    """One that is taken; thousands are held at a time."""

    __slots__ = ("_taken", "_user")

    def __init__(self, taken: Counter[str], user: str) -> None:
        self._taken, self._user = taken, user

    def __enter__(self) -> None:
        self._taken[self._user] += 1

    def __exit__(self, *_: object) -> None:
        self._taken[self._user] -= 1
        if not self._taken[self._user]:
            del self._taken[self._user]
