from __future__ import annotations

from collections.abc import Sequence


def added(values: Sequence[int], offset: int) -> list[int]:
    return [value + offset for value in values]
