"""A job's events on the terminal: log lines, a progress bar below them, and the outcome."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import click

from core4.console import console, printable

if TYPE_CHECKING:
    from core4.client import Client, Event, StateEvent

OUTCOMES = {"complete": 0, "error": 1, "killed": 3, "inactive": 4}  # exit codes
DETACHED = 130


class Display(Protocol):
    """Shows events as they come; a context manager."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *reason: Any) -> None: ...

    def event(self, event: Event) -> None:
        """Show one event."""


def watch(client: Client, job_id: str, output: str = "table", after: str | None = None) -> int:
    """Show what happens to a job until it ends; returns the exit code of its outcome."""
    state, last = "", after or ""
    try:
        with _display(output) as display:
            for event in client.follow(job_id, after, on_lost=_lost):
                last, state = event.id or last, getattr(event, "state", state)
                display.event(event)
    except KeyboardInterrupt:
        again = f"core4 job follow {job_id}" + (f" --after {last}" if last else "")
        click.echo(f"\ndetached; the job goes on. Attach again: {again}", err=True)
        return DETACHED
    if state not in OUTCOMES:  # the stream had been read to its end before
        state = str(client.show(job_id)["state"])
    return OUTCOMES.get(state, 1)


def _lost(cause: str) -> None:
    click.echo(f"connection lost ({printable(cause)}); trying again", err=True)


def line_text(line: dict[str, Any]) -> str:
    """One log line for people, in local time."""
    time = datetime.fromtimestamp(float(line["epoch"]), UTC).astimezone().strftime("%H:%M:%S")
    text = f"{time} {line['level']:<7} {line['message']}"
    trace = "".join((line.get("exception") or {}).get("text") or ())
    return printable(text + (f"\n{trace}" if trace else "")).rstrip("\n")


def _display(output: str) -> Display:
    if output == "json":
        return JsonLines()
    return Bar() if console().is_terminal else Lines()


class JsonLines:
    """Every event as one line of JSON."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *reason: Any) -> None: ...

    def event(self, event: Event) -> None:
        name = type(event).__name__.removesuffix("Event").lower()
        data = next(value for key, value in vars(event).items() if key != "id")
        click.echo(json.dumps({"event": name, "id": event.id, "data": data}, default=str))


class Lines:
    """For files and pipes: log lines, and one line for each change of the state."""

    def __init__(self) -> None:
        self._state = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *reason: Any) -> None: ...

    def event(self, event: Event) -> None:
        from core4.client import LogEvent, StateEvent

        if isinstance(event, LogEvent):
            click.echo(line_text(event.line))
        elif isinstance(event, StateEvent) and event.state != self._state:
            self._state = event.state
            click.echo(f"{event.job['_id']} {_state_text(event)}")


class Bar:
    """For terminals: a progress bar that stays below the log lines."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console(),
        )
        self._task = self._progress.add_task("waiting", total=1.0, note="")
        self._open = ExitStack()

    def __enter__(self) -> Bar:
        self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def event(self, event: Event) -> None:
        from core4.client import LogEvent, StateEvent

        if isinstance(event, LogEvent):
            self._progress.console.print(line_text(event.line), markup=False, highlight=False)
        elif isinstance(event, StateEvent):
            note = printable(str((event.job.get("prog") or {}).get("message") or "")).partition("\n")[0]
            self._progress.update(
                self._task, completed=event.progress, description=_state_text(event), note=note[:60]
            )


def _state_text(event: StateEvent) -> str:
    state, error = event.state, event.job.get("last_error") or {}
    if state in ("failed", "error") and error.get("exception"):
        return printable(f"{state}: {error['exception']:.200}")
    return state
