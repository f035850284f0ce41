"""`core4 pause`, `resume`, `controls` and `halt`: hold work back, let it go on, end the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from core4.console import JSON_OPTION, connect, echo_json, moment, show_rows

_SCOPES = {
    "namespace": "Jobs in this namespace.",
    "job": "Jobs of this name.",
    "project": "Jobs whose names begin with this part, up to the first dot.",
    "worker": "All jobs on this worker, as worker@host.",
}
_REASON = click.option("--reason", help="Why; told to whoever asks.")


def _target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for scope, words in reversed(_SCOPES.items()):
        command = click.option(f"--{scope}", help=words)(command)
    return command


def _target(given: dict[str, str | None]) -> tuple[str, str]:
    named = [(scope, target) for scope, target in given.items() if target]
    if len(named) > 1:
        raise click.UsageError("only one of " + ", ".join(f"--{scope}" for scope in _SCOPES))
    return named[0] if named else ("everything", "")


@click.command()
@_target_options
@_REASON
def pause(reason: str | None, **given: str | None) -> None:
    """Start no more jobs: everything, or what an option names. Those that run go on.

    \b
    Examples:
      core4 pause --reason "database upgrade"
      core4 pause --job my_jobs.Report
      core4 pause --project my_jobs
    """
    scope, target = _target(given)
    with connect() as client:
        made = client.pause(scope, target, reason=reason)
    click.echo(f"{f'{scope} {target}'.rstrip()} is paused by {made['by']} since {moment(made['at'])}")


@click.command()
@_target_options
def resume(**given: str | None) -> None:
    """End a pause: that of everything, or of what an option names. Its jobs go back in line.

    \b
    Examples:
      core4 resume
      core4 resume --job my_jobs.Report
    """
    scope, target = _target(given)
    what = f"{scope} {target}".rstrip()
    with connect() as client:
        ended = client.resume(scope, target)
    click.echo(f"{what} goes on" if ended else f"{what} was not paused")


@click.command()
@JSON_OPTION
def controls(output: str) -> None:
    """Show what is paused, and how many of its jobs still run and are held.

    \b
    Example:
      core4 controls
    """
    with connect() as client:
        found = client.controls()
    if output == "json":
        echo_json(found)
        return
    rows = [{**each, "since": moment(each["at"])} for each in found["pauses"]]
    last = found["halt"]
    caption = f"workers halted by {last['by']} at {moment(last['at'])}" if last else ""
    show_rows(rows, ["scope", "target", "running", "held", "by", "since", "reason"], output, caption)


@click.command()
@_REASON
@click.option("--yes", is_flag=True, help="Do not ask.")
def halt(reason: str | None, yes: bool) -> None:
    """End all workers that are up now, as a SIGTERM would. Those that are started later are not meant.

    \b
    Example:
      core4 halt --yes --reason "move to other hosts"
    """
    if not yes:
        click.confirm("End all workers?", abort=True)
    with connect() as client:
        made = client.halt(reason=reason)
    click.echo(f"workers that were started before {moment(made['at'])} end")
