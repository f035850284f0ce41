"""What is measured, beside what: a product figure and its floor in the same, interleaved repetition."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Document = dict[str, Any]
Measure = Callable[[], Awaitable[Sequence[float]]]  # one repetition: seconds per operation, once or often


@dataclass
class Figure:
    """One thing that is timed; its figure in a repetition is the median of what was measured there."""

    name: str
    measure: Measure
    repetitions: list[float] = field(default_factory=list)
    slow: list[float] = field(default_factory=list)  # the 95th percentile, where a repetition has many

    async def repeat(self) -> None:
        """One repetition."""
        seconds = await self.measure()
        self.repetitions.append(statistics.median(seconds))
        if len(seconds) >= 10:
            self.slow.append(statistics.quantiles(seconds, n=20)[-1])

    @property
    def median(self) -> float:
        """Seconds of one operation."""
        return statistics.median(self.repetitions)


@dataclass(frozen=True)
class Goal:
    """How a figure has to compare to its floor.

    `rate` says how fast it is (floor's time by its own), `time` how long it takes (its own by the floor's).
    """

    number: str  # in the list of goals
    figure: Figure
    floor: Figure
    wanted: float | None  # None: told, and nothing is asked for
    by: Literal["rate", "time"] = "rate"
    plus: float = 0.0  # seconds that are granted on top of the floor

    @property
    def ratios(self) -> list[float]:
        """One per repetition: what was measured side by side is compared."""
        pairs = zip(self.figure.repetitions, self.floor.repetitions, strict=True)
        if self.by == "rate":
            return [floor / own for own, floor in pairs]
        return [own / (floor + self.plus) for own, floor in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        if self.wanted is None:
            return True
        return self.ratio >= self.wanted if self.by == "rate" else self.ratio <= self.wanted

    def row(self) -> Document:
        return {
            "goal": self.number,
            "name": self.figure.name,
            "floor": self.floor.name,
            "by": self.by,
            "ratio": round(self.ratio, 3),
            "lowest": round(min(self.ratios), 3),
            "highest": round(max(self.ratios), 3),
            "wanted": self.wanted,
            "met": self.met,
            "ms": round(self.figure.median * 1000, 4),
            "p95_ms": round(statistics.median(self.figure.slow) * 1000, 4) if self.figure.slow else None,
            "floor_ms": round(self.floor.median * 1000, 4),
        }


def middle(ended: Sequence[float]) -> float:
    """Seconds per job of the 20 to 95 % part of a drain: neither the worker's start nor the tail counts."""
    ended = sorted(ended)
    low, high = int(len(ended) * 0.2), int(len(ended) * 0.95)
    return (ended[high] - ended[low]) / (high - low)


def figures(goals: Sequence[Goal]) -> list[Figure]:
    """All of them, each once, in the order in which they come up; a floor comes before what stands on it."""
    return list({id(each): each for goal in goals for each in (goal.floor, goal.figure)}.values())


def table(rows: Sequence[Document]) -> str:
    """The rows as text."""
    lines = [
        f"{'':5}{'':46}{'median':>10}{'p95':>10}{'floor':>10}   {'ratio':>6} {'(min-max)':15}{'goal':>8}"
    ]
    for row in rows:
        p95 = "" if row["p95_ms"] is None else f"{row['p95_ms']:.2f}"
        span = f"({row['lowest']:.2f}-{row['highest']:.2f})"
        goal = "" if row["wanted"] is None else ("> " if row["by"] == "rate" else "< ") + f"{row['wanted']:g}"
        lines.append(
            f"{row['goal']:5}{row['name']:46}{row['ms']:>10.3f}{p95:>10}{row['floor_ms']:>10.3f}   "
            f"{row['ratio']:>6.2f} {span:15}{goal:>8} {'' if row['met'] else 'no'}".rstrip()
        )
    lines.append("times in ms; a goal with > is the floor's time by ours, one with < ours by the floor's")
    return "\n".join(lines)
