"""Faults on purpose: writes of the stores that die, lose their reply or come late. For tests only.

Off unless ``CORE4_TEST_FAULTS`` is set, and that is refused without ``CORE4_TEST_MODE=1``. A spec is a list
of rules, separated by semicolons; a site is ``module:function:method`` of the calling store or ``*``:

    kill before store:cas:update_one 2    SIGKILL for this process before the second such write
    kill after logs:append:insert_one       ... when it is done
    lose store:cas:update_one             do it, then raise what a dropped connection raises
    late 0.5 store:cas:update_one         raise that at once and do it half a second later
    delay 0.5 store:cas:update_one        do it half a second later
    plant package.module:function           call this before the first collection is handed out
    count /path/of/a/file                   append a line for each write that its lease was lost for

The number at the end says which of the process's calls of that site it is (1), 0 stands for each.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pymongo.errors import AutoReconnect

from core4.errors import ConfigError

VARIABLE, PERMIT = "CORE4_TEST_FAULTS", "CORE4_TEST_MODE"
WRITES = frozenset(
    {
        *("insert_one", "insert_many", "bulk_write", "replace_one"),
        *("update_one", "update_many", "delete_one", "delete_many"),
        *("find_one_and_update", "find_one_and_replace", "find_one_and_delete"),
    }
)

T = TypeVar("T")


class Hit(NamedTuple):
    """One write that was made: where it is called from."""

    module: str
    function: str
    method: str
    line: int

    @property
    def site(self) -> str:
        return f"{self.module}:{self.function}:{self.method}"


@dataclass
class Rule:
    """What to do at the `number`-th call of a site."""

    verb: str
    site: str
    number: int = 1
    seconds: float = 0.0
    seen: int = 0

    def applies(self, site: str) -> bool:
        """Counts one call; True if it is the one."""
        if self.site not in ("*", site):
            return False
        self.seen += 1
        return self.number in (0, self.seen)


@dataclass
class Faults:
    """The rules of this process and the writes it has made under them."""

    rules: list[Rule] = field(default_factory=list)
    plants: list[str] = field(default_factory=list)
    trace: list[Hit] = field(default_factory=list)
    refusals: str | None = None
    _late: set[asyncio.Task[Any]] = field(default_factory=set)

    @classmethod
    def parse(cls, spec: str) -> Faults:
        """Raises: ConfigError."""
        faults = cls()
        for text in filter(None, (part.strip() for part in spec.split(";"))):
            words = text.split()
            try:
                if words[0] == "plant":
                    faults.plants.append(words[1])
                elif words[0] == "count":
                    faults.refusals = words[1]
                else:
                    faults.rules.append(_rule(words))
            except (IndexError, ValueError, KeyError):
                raise ConfigError(f"{VARIABLE}: {text!r} is no rule") from None
        return faults

    def plant(self) -> None:
        """Call what is to be planted, once. Not at the import of this module: it patches the stores."""
        while self.plants:
            module, _, function = self.plants.pop().partition(":")
            getattr(importlib.import_module(module), function)()

    async def perform(self, hit: Hit, write: Callable[[], Awaitable[T]]) -> T:
        """Make the write, or what the rules make of it."""
        self.trace.append(hit)
        verbs = {rule.verb: rule for rule in self.rules if rule.applies(hit.site)}
        if "kill before" in verbs:
            os.kill(os.getpid(), signal.SIGKILL)
        if "late" in verbs:
            task = asyncio.ensure_future(_later(verbs["late"].seconds, write))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            raise AutoReconnect("connection lost on purpose, the write is still under way")
        if "delay" in verbs:
            await asyncio.sleep(verbs["delay"].seconds)
        try:
            result = await write()
        finally:
            if "kill after" in verbs:
                os.kill(os.getpid(), signal.SIGKILL)
            if "lose" in verbs:
                raise AutoReconnect("connection lost on purpose, the write is done")
        return result

    async def landed(self) -> None:
        """Wait until every late write has been made."""
        await asyncio.gather(*self._late, return_exceptions=True)


async def _later(seconds: float, write: Callable[[], Awaitable[T]]) -> T:
    await asyncio.sleep(seconds)
    return await write()


def _rule(words: list[str]) -> Rule:
    verb, rest = words[0], words[1:]
    seconds = 0.0
    if verb == "kill":
        verb += {"before": " before", "after": " after"}[rest.pop(0)]
    elif verb in ("late", "delay"):
        seconds = float(rest.pop(0))
    elif verb != "lose":
        raise ValueError(verb)
    site, *number = rest
    return Rule(verb, site, int(*number) if number else 1, seconds)


class _Faulty:
    """A collection whose writes go through `Faults`."""

    def __init__(self, collection: Any, faults: Faults) -> None:
        self._collection, self._faults = collection, faults

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._collection, name)
        if name not in WRITES:
            return method

        def call(*args: Any, **options: Any) -> Awaitable[Any]:
            frame = sys._getframe(1)
            module = str(frame.f_globals["__name__"]).removeprefix("core4.")
            hit = Hit(module, frame.f_code.co_name, name, frame.f_lineno)
            return self._write(hit, lambda: method(*args, **options), args[0])

        return call

    async def _write(self, hit: Hit, write: Callable[[], Awaitable[Any]], where: Any) -> Any:
        result = await self._faults.perform(hit, write)
        if self._faults.refusals is not None and isinstance(where, Mapping) and "lease.id" in where:
            await self._count(hit, where, result)
        return result

    async def _count(self, hit: Hit, where: Mapping[str, Any], result: Any) -> None:
        """Note a write that the fence refused; one that lost a race for the revision is none."""
        done = getattr(result, "matched_count", None) or getattr(result, "deleted_count", None)
        held = {name: where[name] for name in ("_id", "lease.id")}
        if not done and await self._collection.find_one(held, {"_id": 1}) is None:
            _append(str(self._faults.refusals), f"{hit.site} {where['_id']} {where['lease.id']}\n")


def _append(path: str, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)


def _from_environment(environ: Mapping[str, str]) -> Faults | None:
    spec = environ.get(VARIABLE)
    if spec is None:
        return None
    if environ.get(PERMIT) != "1":
        raise ConfigError(f"{VARIABLE} breaks writes on purpose: unset it ({PERMIT}=1 permits it to tests)")
    return Faults.parse(spec)


_active: Faults | None = _from_environment(os.environ)


def wrap(collection: T) -> T:
    """The collection itself; in a process with faults, one that makes them."""
    if _active is None:
        return collection
    _active.plant()
    return _Faulty(collection, _active)  # type: ignore[return-value]


@contextmanager
def armed(faults: Faults) -> Iterator[Faults]:
    """Collections that are handed out inside the block make these faults, for as long as they live."""
    global _active
    before, _active = _active, faults
    try:
        yield faults
    finally:
        _active = before
