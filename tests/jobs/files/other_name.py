from __future__ import annotations

import asyncio

import neighbour  # type: ignore[import-not-found]

from core4 import subprocess


@subprocess
async def anything_else(*args: int, offset: int = 0) -> list[int]:
    await asyncio.sleep(0)
    found: list[int] = neighbour.added(args, offset)
    return found


if __name__ == "__main__":
    anything_else()
