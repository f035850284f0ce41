"""`core4 job kill|restart|remove --filter ...`: one command for all jobs that match."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from core4.console import UNREACHABLE, USAGE, connect, echo_error, echo_json, json_value

STATES = ["blocked", "pending", "running", "failed", "deferred", "error", "killed", "inactive", "complete"]
SHOWN = 10  # jobs that are named to people

_OPTIONS = (
    click.option(
        "--filter", "where", help='Instead of ids: conditions as JSON, like {"args.month": "2026-01"}.'
    ),
    click.option(
        "--state", "states", multiple=True, type=click.Choice(STATES), help="Only these; repeatable."
    ),
    click.option("--search", help="Part of the jobs' name, with ? and *."),
    click.option("--all", "every", is_flag=True, help="Every job, instead of a filter."),
    click.option("--dry-run", is_flag=True, help="Change nothing, show what would be done."),
    click.option("-y", "--yes", is_flag=True, help="Do not ask; needed where nobody can be asked."),
)


def selecting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that select jobs; a command gets them as one mapping, see `meant`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def meant(picked: Mapping[str, Any], ids: bool) -> bool:
    """True if the jobs are selected by options; checks that it is either these or ids.

    Raises: UsageError.
    """
    selected = any(picked[name] for name in ("where", "states", "search", "every"))
    if selected == ids:
        raise click.UsageError("name jobs either by id or by --filter, --state, --search or --all")
    if ids and picked["dry_run"]:
        raise click.UsageError("--dry-run goes with --filter, --state, --search or --all")
    return selected


def conditions(where: str | None, states: tuple[str, ...]) -> dict[str, Any] | None:
    """The filter that --filter and --state stand for.

    Raises: UsageError.
    """
    found = json_value(where) if where else {}
    if not isinstance(found, dict):
        raise click.UsageError("--filter is no JSON object")
    if states:
        found["state"] = {"in": list(states)}
    return found or None


def act(action: str, output: str, *, journal: bool = False, **picked: Any) -> int:
    """Do it, having asked; the exit code says whether all that match were done."""
    selection = {
        "filter": conditions(picked["where"], picked["states"]),
        "search": picked["search"],
        "all": picked["every"],
        "journal": journal,
    }
    with connect() as client:
        if not picked["dry_run"] and not picked["yes"]:
            first = client.bulk(action, **selection, dry_run=True, at_most=SHOWN)
            if not _confirmed(action, first):
                return USAGE
        report = client.bulk(action, **selection, dry_run=picked["dry_run"], on_answer=_progress)
    if output == "json":
        echo_json(report)
    else:
        _show(action, report)
    if report["stopped"]:
        echo_error(f"not finished, run it again: {report['stopped']}")
        return UNREACHABLE
    return USAGE if report["refused"] else 0


def _confirmed(action: str, first: Mapping[str, Any]) -> bool:
    if not first["matched"]:
        return True  # nothing will be done, and said so
    if not sys.stdin.isatty():
        echo_error(f"{first['matched']} jobs match: {action} them with --yes, look at them with --dry-run")
        return False
    for job in first["jobs"]:
        click.echo(_line(job), err=True)
    if first["more"]:
        click.echo("...", err=True)
    return click.confirm(f"{action} {_jobs(first['matched'])}?", err=True)


def _progress(report: Mapping[str, Any]) -> None:
    """Say how far it is, while there is more to do."""
    if report["more"] and not report["stopped"]:
        click.echo(f"{len(report['jobs'])} of {report['matched']}", err=True)


def _show(action: str, report: Mapping[str, Any]) -> None:
    if report["dry_run"]:
        for job in report["jobs"][:SHOWN]:
            click.echo(_line(job))
        if len(report["jobs"]) > SHOWN:
            click.echo("...")
    refused = [job for job in report["jobs"] if job["outcome"] == "refused"]
    for job in refused[:SHOWN]:
        echo_error(f"{job['_id']}: {job['detail']}")
    counts = [
        f"{report[name]} {name}" for name in ("changed", "unchanged", "refused", "gone") if report[name]
    ]
    would = "would be: " if report["dry_run"] else ""
    click.echo(f"{action}: {_jobs(report['matched'])}" + (f", {would}{', '.join(counts)}" if counts else ""))


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _line(job: Mapping[str, Any]) -> str:
    return " ".join(str(job[name]) for name in ("_id", "state", "outcome") if job.get(name))
