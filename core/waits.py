"""Waiting for an event, with a limit."""

from __future__ import annotations

import asyncio


async def heard(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, `seconds` at most; whether it is set."""
    try:
        # Not `wait_for`: in Python 3.11 it loses a cancellation that comes together with the event.
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
