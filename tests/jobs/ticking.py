"""Jobs that schedule themselves."""

from __future__ import annotations

from core4 import CoreJob


class Ticking(CoreJob):
    """Every second."""

    author = "tests"
    qual_name = "tests.jobs.Ticking"
    schedule = "* * * * * *"

    def execute(self) -> None:
        """Nothing: that it is made is what counts."""


class Yearly(CoreJob):
    """Far away, with all that can be said of a schedule."""

    author = "tests"
    qual_name = "tests.jobs.Yearly"
    schedule = {  # noqa: RUF012 - declared like the other attributes
        "name": "reports/yearly",
        "expression": "0 6 1 1 *",
        "zone": "Europe/Berlin",
        "args": {"month": "2026-01"},
        "options": {"priority": 5},
        "missed": "all",
        "limit": 3,
        "max_age": 86400,
    }

    def execute(self, month: str) -> str:
        return month
