"""`core4 doctor`: what is stuck or inconsistent, why, and the repair of it. Talks to the database."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from core4.console import JSON_OPTION, USAGE, console, echo_error, echo_json, load_settings, show_rows

if TYPE_CHECKING:
    from core4.config import Settings
    from core4.doctor import Progress
    from core4.findings import Report

_COLUMNS = ["kind", "_id", "name", "reason", "since", "what to do"]


@click.command()
@click.option("--repair", is_flag=True, help="Repair what is safe to repair, beside running workers, too.")
@click.option("--all", "everything", is_flag=True, help="Look at all of the journal, not only at the newest.")
@click.option(
    "--patience",
    type=click.FloatRange(0, 600),
    help="Seconds for which something must stand wrong to be told.  [default: 15]",
)
@JSON_OPTION
def doctor(repair: bool, everything: bool, patience: float | None, output: str) -> int:
    """Say what is stuck or inconsistent, and why; with --repair, put it right.

    Talks to the database, not to the API. Exit codes: 0 nothing is wrong, 1 something is (what only waits
    does not count), 2 bad usage or no database.

    \b
    Examples:
      core4 doctor
      core4 doctor --repair
      core4 doctor --all -o json
    """
    import asyncio

    from pymongo.errors import PyMongoError

    from core4.embedded import database_url
    from core4.service import masked

    settings = load_settings()
    try:
        with database_url(settings) as url, _progress() as progress:
            options = {"everything": everything, "progress": progress}
            if patience is not None:
                options["patience"] = patience
            report = asyncio.run(_look(settings, url, options, repair=repair))
    except PyMongoError as error:
        echo_error(f"the database does not answer: {masked(str(error))[:200]}\nSee CORE4_MONGO_URL.")
        return USAGE
    if output == "json":
        echo_json(report.view())
    else:
        _show(report)
    return 1 if report.wrong else 0


async def _look(settings: Settings, url: str, options: dict[str, Any], *, repair: bool) -> Report:
    from core4.database import Database
    from core4.doctor import Doctor

    database = await Database.connect(url, settings.mongo_database, app_name="core4-doctor")
    try:
        found = Doctor(database, settings, **options)
        return await (found.repair(by=_who()) if repair else found.examine())
    finally:
        await database.close()


def _who() -> str:
    try:
        return f"doctor ({getpass.getuser()})"
    except (KeyError, OSError):  # a user without a name, as in containers
        return f"doctor (user {os.getuid()})"


@contextmanager
def _progress() -> Iterator[Progress]:
    """One line on a terminal that says what is looked at."""
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    with console(stderr=True).status("looking") as status:
        yield lambda what, done: status.update(f"{what}: {done}")


def _show(report: Report) -> None:
    for title, findings in (("repaired", report.repaired), ("found", report.findings)):
        if findings:
            click.echo(f"{title}:")
            rows = []
            for finding in findings:
                row = finding.view()
                since = finding.since.astimezone().strftime("%Y-%m-%d %H:%M:%S") if finding.since else ""
                action = row["repair"] if finding in report.repaired else _action(row)
                rows.append({**row, "since": since, "what to do": action})
            show_rows(rows, _COLUMNS, "table")
    waiting = sum(not finding.wrong for finding in report.findings)
    more = f", {report.more} of them not shown" if report.more else ""
    click.echo(f"{report.wrong} wrong{more}, {waiting} waiting, {len(report.repaired)} repaired")


def _action(row: dict[str, Any]) -> str:
    return f"core4 doctor --repair: {row['repair']}" if row["repair"] else str(row["advice"] or "")
