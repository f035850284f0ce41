"""`core4 events` and `core4 counts`: who did what, and how many jobs were in which state when."""

from __future__ import annotations

from typing import Any

import click

from core4.console import JSON_OPTION, connect, json_value, moment, parse_time, show_rows

_STATES = ("pending", "running", "failed", "deferred", "error", "killed", "inactive")
_PAGE = click.option("--page", type=int, default=0, show_default=True, help="Page; -1 is the last one.")
_PER_PAGE = click.option("--per-page", type=click.IntRange(1, 500), default=50, show_default=True)


def _time(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None:
        try:
            parse_time(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is no time like 2026-01-31T12:00") from None
    return text


_SINCE = click.option(
    "--since", metavar="TIME", callback=_time, help="From this time on, as 2026-01-31T12:00 in UTC."
)
_UNTIL = click.option("--until", metavar="TIME", callback=_time, help="Up to this time.")


@click.command()
@click.option("--author", help="What this user did.")
@click.option("--job", "job_id", help="What was done to the job of this id.")
@click.option("--name", help="Only these, like job.kill.")
@click.option("--request", "request_id", help="What one request did, by its X-Request-ID.")
@_SINCE
@_UNTIL
@click.option("--filter", "where", help='More conditions as JSON, like {"outcome": {"ne": "done"}}.')
@_PAGE
@_PER_PAGE
@JSON_OPTION
def events(
    since: str | None,
    until: str | None,
    where: str | None,
    page: int,
    per_page: int,
    output: str,
    **named: Any,
) -> None:
    """Who did what, newest first: jobs, schedules, pauses, users, sign-ins, workers. For administrators.

    \b
    Examples:
      core4 events --author carol
      core4 events --job 65a0c0ffee00000000000001 -o json
      core4 events --name job.kill --since 2026-01-31
    """
    terms: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    span = {name: value for name, value in (("gte", since), ("lte", until)) if value is not None}
    terms |= {"created": span} if span else {}
    more = json_value(where) if where else {}
    if not isinstance(more, dict):
        raise click.UsageError("--filter takes a JSON object")
    with connect() as client:
        found = client.events(filter={**terms, **more}, page=page, per_page=per_page)
    rows = list(found)
    if output == "table":
        rows = [{**row, "at": moment(row["created"]), "object": _object(row)} for row in rows]
    caption = f"{found.total} in all, page {page} of {found.page_count}"
    show_rows(rows, ["at", "author", "name", "object", "outcome", "request_id"], output, caption)


def _object(row: dict[str, Any]) -> str:
    """What it was done to, in a few words."""
    data = dict(row.get("data") or {})
    if row.get("job_id"):
        return f"{row['job_id']} {row['qual_name']} {data.get('reason') or ''}".strip()
    return " ".join(f"{name}={value}" for name, value in data.items())


@click.command()
@_SINCE
@_UNTIL
@_PAGE
@_PER_PAGE
@JSON_OPTION
def counts(since: str | None, until: str | None, page: int, per_page: int, output: str) -> None:
    """How many jobs of the queue were in which state, over time, newest first; the last 7 days by default.

    \b
    Examples:
      core4 counts
      core4 counts --since 2026-01-01 --until 2026-01-31 -o json
    """
    with connect() as client:
        found = client.state_history(since=since, until=until, page=page, per_page=per_page)
    rows = list(found)
    if output == "table":
        rows = [{**row, "from": moment(row["created"])} for row in rows]
    caption = f"{found.total} in all, page {page} of {found.page_count}"
    show_rows(rows, ["from", "total", *_STATES], output, caption)
