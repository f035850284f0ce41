"""Functions that tests send elsewhere."""

from __future__ import annotations

import math
from typing import Any

LIMIT = 3


def addition(a: int, b: int) -> int:
    return a + b


def divide(a: float, b: float = 0.0) -> float:
    return a / b


def uses_a_global(a: int) -> int:
    return a + LIMIT


def uses_an_import(a: float) -> float:
    return math.sqrt(a)


def looks_for_a_global() -> list[str]:
    """Everything that is around it where it runs."""
    return sorted(name for name in globals() if not name.startswith("__"))


def imports_inside(a: float) -> float:
    import math

    return math.sqrt(a)


def returns_a_set() -> Any:
    return {1, 2}


def returns_an_object() -> Any:
    return object()


def returns_a_reference() -> Any:
    """What a driver would make a reference to another document of."""
    return {"$ref": "x", "$id": 1}


def forges_frames(frames: list[str]) -> None:
    """Says to the worker what it likes."""
    import os
    import struct

    for frame in frames:
        os.write(3, struct.pack(">I", len(frame)) + frame.encode())
    os._exit(0)


def spins() -> None:
    while True:
        pass


def kills_itself() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def waits_for(path: str) -> str:
    """Ends when the file is there."""
    import os
    import time

    while not os.path.exists(path):
        time.sleep(0.02)
    return "OK"


def counted(path: str, number: int) -> int:
    """Notes in a file that it ran."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


def numbered(number: int, text: str = "") -> str:
    print("this is", number)
    return f"{text}{number}"


def sums_up(process: Any) -> dict[str, Any]:
    process.log.info("adding %s", process.job.name)
    return {"sum": sum(process.results.values()), "ids": list(process.results)}


def has_no_context(a: int = 1) -> int:
    return a


def makes_text(size: int, mark: int) -> str:
    return str(mark) * size


def stops_at_times(stop: bool) -> str:
    if stop:
        breakpoint()
    return "went on"


def exits() -> None:
    raise SystemExit(3)


def enqueues() -> str:
    from core4.context import current

    context = current()
    assert context is not None
    return context.enqueue("core4.queue.helper.job.example.DummyJob", {})


async def sleeps(name: str, wait: bool = True) -> list[Any]:
    import asyncio

    await asyncio.sleep(0)
    return [name, wait]


def template() -> list[Any]:
    greeting = "hello {name}"
    return [greeting, "{count}", "{options}", "{unknown}"]


def marked(number: int) -> list[Any]:
    return ["{mark}", number]


def decorated(function: Any) -> Any:
    return function


@decorated
def with_decorator() -> int:
    return 1


class Actor:
    def method(self, a: int) -> int:
        return a + 1
