"""How many workers a pool wants."""

from __future__ import annotations

import pytest

from core4.pool import Size


@pytest.mark.row("M30")
@pytest.mark.parametrize(
    ("queued", "busy", "slots", "wanted"),
    [(0, 0, 1, 1), (1, 0, 1, 1), (4, 5, 1, 9), (30, 3, 1, 10), (0, 7, 1, 7), (5, 0, 2, 3)],
)
def test_it_follows_queued_and_busy_between_its_limits(
    queued: int, busy: int, slots: int, wanted: int
) -> None:
    assert Size(1, 10).wanted(queued + busy, slots) == wanted
    assert Size(3, 3).wanted(queued + busy, slots) == 3
