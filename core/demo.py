"""`core4 demo`: the whole system in a temporary folder, one real job over HTTP, its result, and gone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from core4.client import Client
from core4.config import DEFAULT_USER, Settings
from core4.console import console, show_rows
from core4.display import watch
from core4.errors import ConfigError
from core4.examples import AccessLogReport
from core4.stack import Interrupted, Stack, interruptible

NEXT_STEPS = """\
That was: a database, an API and a worker started, a job enqueued over HTTP and followed to its end.
Next (in a checkout `. .venv/bin/activate` first, or `make up` for the first of them):
  core4 up                    keep it running on http://localhost:5001
  core4 init my_jobs.py       write a job of your own
  core4 up my_jobs.py --reload"""


def run(settings: Settings, pace: float) -> int:
    """Run the demo; returns the exit code.

    Args:
        settings: as loaded; home, database and port are replaced where they are in the way.
        pace: seconds that the job takes.
    """
    home = Path(tempfile.mkdtemp(prefix="core4-demo-"))
    try:
        with (home / "demo.log").open("wb") as output, interruptible():
            # Whatever else is set here for a real installation has no business in the demo.
            settings = replace(
                settings, home=home, mongo_url=None, host="127.0.0.1", jobs=(), namespaces=("DEFAULT",)
            )
            return _run(settings, pace, output)
    except Interrupted:
        click.echo("\nstopped", err=True)
        return 130
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _run(settings: Settings, pace: float, output: Any) -> int:
    stack = _started(settings, output)
    try:
        name = AccessLogReport.qual_name
        click.echo(f"core4 is running on {stack.url}; the job {name} is sent to it over HTTP.\n", err=True)
        with Client(stack.url, DEFAULT_USER) as client:
            job_id = client.enqueue(name, {"pace": _pause(pace)})
            code = watch(client, job_id)
            if code == 0:
                _report(client.show(job_id).get("result") or {})
    except BaseException:
        stack.kill()
        raise
    click.echo("\n" + NEXT_STEPS, err=True)
    stack.stop()
    return code


def _started(settings: Settings, output: Any) -> Stack:
    """A running stack on the usual port, or on a free one if that is taken."""
    try:
        stack = Stack(settings, say=_quiet, output=output)
        stack.start()
    except ConfigError:
        if settings.port == 0:
            raise
        stack = Stack(replace(settings, port=0), say=_quiet, output=output)
        stack.start()
    return stack


def _pause(seconds: float) -> float:
    """The job's pause after each block of lines that makes it take about `seconds`."""
    with (AccessLogReport.SHIPPED / "access.log").open("rb") as log:
        lines = sum(1 for _ in log)
    return seconds / max(lines / AccessLogReport.BLOCK, 1)


def _quiet(_line: str) -> None:
    """The demo's own lines say enough."""


def _report(result: Mapping[str, Any]) -> None:
    """Tables of a report: its single values first, then each list and mapping."""
    click.echo()
    single = [
        {"": name, "value": value} for name, value in result.items() if not isinstance(value, list | dict)
    ]
    show_rows(single, ["", "value"], "table")
    for name, value in result.items():
        rows = _rows(value)
        if rows:
            console().print(f"\n{name}", style="bold", markup=False, highlight=False)
            show_rows(rows[:24], list(rows[0]), "table")


def _rows(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [{"": key, "count": each} for key, each in value.items()]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value
    return []
