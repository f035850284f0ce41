"""What the workers from Python are started with, before anything is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from core4 import workers
from core4.config import Settings
from core4.errors import ConfigError

Call = Callable[[], Any]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: workers.worker_start("subprocess"), r"nr is 'subprocess', .* start_worker\(type, nr\)"),  # type: ignore[arg-type]
        (lambda: workers.worker_subprocess_start(0), "nr is 0, expected a whole number from 1"),
        (lambda: workers.worker_tmux_start(True), "nr is True, expected a whole number from 1"),
        (lambda: workers.workers_tmux_start(0), "nr_workers is 0, expected a whole number from 1 to 1000"),
        (lambda: workers.workers_subprocess_start(min=1), r"min is neither .*, did you mean minimum\?"),
        (lambda: workers.workers_subprocess_start(timout=1), r"timout is neither an argument here nor a"),
        (lambda: workers.workers_subprocess_start(job=["a.py"]), r"did you mean jobs\?"),
        (lambda: workers.workers_subprocess_start(minimum=3, maximum=1), "minimum is 3, maximum only 1"),
        (lambda: workers.workers_subprocess_start(maximum=0), "maximum is 0, expected"),
        (lambda: workers.workers_subprocess_start("3"), "nr_fixed_workers is '3', expected"),  # type: ignore[arg-type]
        (lambda: workers.start_worker("thread"), "type is 'thread', expected one of inprocess, subprocess"),  # type: ignore[arg-type]
        (lambda: workers.workers_find(slot=1), r"did you mean slots\?"),
    ],
)
def test_what_no_worker_can_be_started_with(call: Call, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        call()


def test_jobs_may_be_written_as_in_the_environment() -> None:
    assert workers._load({"jobs": "my_jobs.py, other"}).jobs == ("my_jobs.py", "other")


def test_a_setting_that_is_none_is_named() -> None:
    """Wherever settings are keywords; and a wrong value with the option that the command line has."""
    with pytest.raises(ConfigError, match=r"unknown setting slot, did you mean slots\?"):
        Settings.load(environ={}, slot=1)
    with pytest.raises(ConfigError, match=r"^--nr is .0., expected"):
        Settings.load(environ={}, worker_nr=0)
