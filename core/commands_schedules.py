"""`core4 schedule ...`: when jobs are made by themselves, through the client library."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click

from core4.console import (
    JSON_OPTION,
    arguments,
    connect,
    echo_json,
    moment,
    parse_time,
    printable,
    show_rows,
)
from core4.display import watch

if TYPE_CHECKING:
    from core4.client import Client

MOST_ROWS = 500  # of one page of the API
COLUMNS = ["_id", "state", "cron", "zone", "next", "last", "fired", "skipped", "changed", "qual_name"]


@click.group()
def schedule() -> None:
    """See, change, pause and trigger schedules.

    What is changed here stands over what the code says, until it is reset.

    \b
    Examples:
      core4 schedule list
      core4 schedule set nightly --job my_jobs.Report --cron '0 6 * * *' --zone Europe/Berlin
    """


@schedule.command("list")
@click.argument("search", required=False)
@JSON_OPTION
def list_(search: str | None, output: str) -> None:
    """List the schedules; SEARCH is a part of the name or of the job's, with ? and *.

    \b
    Examples:
      core4 schedule list
      core4 schedule list report -o json
    """
    rows: list[dict[str, Any]] = []
    with connect() as client:
        for number in itertools.count():
            page = client.schedules(search=search, page=number, per_page=MOST_ROWS, count=1)
            rows += page.rows
            if number + 1 >= page.page_count:
                break
    show_rows(rows if output == "json" else [{**row, **_summary(row)} for row in rows], COLUMNS, output)


@schedule.command()
@click.argument("name")
@JSON_OPTION
def show(name: str, output: str) -> None:
    """Show a schedule: what is in force, what the code and the operator say, and what is next.

    \b
    Example:
      core4 schedule show nightly
    """
    with connect() as client:
        _show(client.schedule(name), output)


@schedule.command("next")
@click.argument("name", required=False)
@click.option("--cron", "expression", help="Try this expression instead of a stored schedule.")
@click.option("--zone", help="Time zone for --cron.  [default: UTC]")
@click.option("--count", type=click.IntRange(1, 100), default=10, show_default=True, help="How many.")
@JSON_OPTION
def next_(name: str | None, expression: str | None, zone: str | None, count: int, output: str) -> None:
    """Show when a schedule fires next, or when an expression would.

    \b
    Examples:
      core4 schedule next nightly
      core4 schedule next --cron '*/15 8-18 * * MON-FRI' --zone Europe/Berlin --count 5
    """
    if (name is None) == (expression is None):
        raise click.UsageError("give the NAME of a schedule, or --cron")
    if name is not None and zone is not None:
        raise click.UsageError("--zone goes with --cron; a schedule has its own")
    with connect() as client:
        if expression is not None:
            found = client.next_fires(expression, zone or "UTC", count=count)
        else:
            found = client.schedule(str(name), count=count)
    rows = [{"utc": text, "local": _in_zone(text, found["zone"])} for text in found["next"]]
    state = found.get("state", "active")
    show_rows(rows, ["local", "utc"], output, "" if rows else f"it does not fire: it is {state}")


@schedule.command("set")
@click.argument("name")
@click.option("--job", "qual_name", help="The job to make; needed for a new schedule.")
@click.option("--cron", "expression", help="When: minute hour day month weekday, or @daily and its like.")
@click.option("--zone", help="Time zone that the expression is read in.")
@click.option("--args", "words", multiple=True, metavar="KEY=VALUE", help="Argument of the job; repeatable.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option like priority=5.")
@click.option("--namespace", help="Namespace of the workers that serve it.")
@click.option("--missed", type=click.Choice(["skip", "one", "all"]), help="What to do after a downtime.")
@click.option("--limit", type=int, help="Most jobs to make up for with --missed all.")
@click.option("--max-age", type=float, help="Seconds after which a missed time is let go.")
@click.option("--enable/--disable", "enabled", default=None, help="Whether it fires at all.")
@JSON_OPTION
def set_(name: str, words: tuple[str, ...], options: tuple[str, ...], output: str, **fields: Any) -> None:
    """Change the schedule NAME, or make a new one. What is not given stays as it is.

    A value of --args is read as JSON, else as text; --args and --option replace all of theirs.

    \b
    Examples:
      core4 schedule set nightly --job my_jobs.Report --cron '0 6 * * *' --args month=2026-01
      core4 schedule set my_jobs.Report --cron @hourly --zone Europe/Berlin --missed skip
      core4 schedule set nightly --disable
    """
    given = {field: value for field, value in fields.items() if value is not None}
    if words:
        given["args"] = arguments(words)
    if options:
        given["options"] = arguments(options)
    with connect() as client:
        changed = client.set_schedule(name, **given)
        _warn(client)
    _show(changed, output)


@schedule.command()
@click.argument("name")
@JSON_OPTION
def pause(name: str, output: str) -> None:
    """Let a schedule fire no more until it is resumed.

    \b
    Example:
      core4 schedule pause nightly
    """
    with connect() as client:
        _tell(client.pause_schedule(name), output)


@schedule.command()
@click.argument("name")
@JSON_OPTION
def resume(name: str, output: str) -> None:
    """Let a paused schedule fire again, from now on.

    \b
    Example:
      core4 schedule resume nightly
    """
    with connect() as client:
        _tell(client.resume_schedule(name), output)


@schedule.command()
@click.argument("name")
@click.option("--key", help="The same key again makes no second job.")
@click.option("-f", "--follow", "attach", is_flag=True, help="Follow the job to its end.")
@JSON_OPTION
def trigger(name: str, key: str | None, attach: bool, output: str) -> int:
    """Make one job now, whatever the schedule's state, and print its id.

    \b
    Examples:
      core4 schedule trigger nightly --follow
      core4 schedule trigger nightly --key ticket-4711
    """
    with connect() as client:
        job_id = client.trigger_schedule(name, key)
        _warn(client)
        if attach:
            return watch(client, job_id, output)
    if output == "json":
        echo_json({"_id": job_id})
    else:
        click.echo(job_id)
    return 0


@schedule.command()
@click.argument("name")
@click.argument("fields", nargs=-1, metavar="[FIELD]...")
@JSON_OPTION
def reset(name: str, fields: tuple[str, ...], output: str) -> None:
    """Take back what was changed: the code's word stands again, on these fields or on all.

    \b
    Examples:
      core4 schedule reset my_jobs.Report
      core4 schedule reset my_jobs.Report expression zone
    """
    with connect() as client:
        _show(client.reset_schedule(name, fields), output)


@schedule.command()
@click.argument("name")
@JSON_OPTION
def delete(name: str, output: str) -> None:
    """Forget a schedule that was made here, or that the code has withdrawn.

    \b
    Example:
      core4 schedule delete nightly
    """
    with connect() as client:
        client.delete_schedule(name)
    if output == "json":
        echo_json({"_id": name, "deleted": True})
    else:
        click.echo(f"schedule {printable(name)} is deleted")


# ---------------------------------------------------------------------- inside


def _warn(client: Client) -> None:
    for warning in client.flash:
        click.echo(f"Warning: {printable(warning)}", err=True)


def _tell(found: Mapping[str, Any], output: str) -> None:
    if output == "json":
        echo_json(found)
    else:
        click.echo(f"schedule {printable(found['_id'])} is {found['state']}")


def _show(found: Mapping[str, Any], output: str) -> None:
    if output == "json":
        echo_json(found)
        return
    rows = [{"field": name, "value": value} for name, value in _details(found).items()]
    show_rows(rows, ["field", "value"], output)


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a schedule's row that are put together from several fields."""
    following: Sequence[str] = found.get("next") or []
    from_code, override = found.get("code") is not None, found.get("override") or {}
    return {
        "cron": found["expression"],
        "next": _in_zone(following[0], found["zone"]) if following else "",
        "last": moment((found.get("last_fired") or {}).get("at")),
        "changed": sorted(override) if from_code else "by operator",
    }


def _details(found: Mapping[str, Any]) -> dict[str, Any]:
    paused, last, skipped = (found.get(key) or {} for key in ("paused", "last_fired", "last_skipped"))
    details = {
        "schedule": found["_id"],
        "job": found["qual_name"],
        "state": found["state"],
        "reason": found.get("reason"),
        "paused": f"{moment(paused['at'])} by {paused['by']}" if paused else None,
        **{name: found.get(name) for name in ("expression", "zone", "args", "options", "namespace")},
        **{name: found.get(name) for name in ("missed", "limit", "max_age")},
        "code says": found.get("code"),
        "operator says": found.get("override") or None,
        "changed": f"{moment(found.get('updated_at'))} by {found.get('updated_by') or 'the code'}",
        "fired": found.get("fired"),
        "last fired": f"{moment(last['at'])}, job {last['job_id']}" if last else None,
        "skipped": found.get("skipped"),
        "last skipped": f"{moment(skipped['at'])}: {skipped['reason']}" if skipped else None,
        "next": [_in_zone(text, found["zone"]) for text in found.get("next") or []],
    }
    return {name: value for name, value in details.items() if value not in (None, "", {}, [])}


def _in_zone(text: str, zone: str) -> str:
    """An API time (UTC) as the clocks of the schedule's zone show it."""
    instant: datetime = parse_time(text)
    try:
        return instant.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M:%S %Z")
    except (ValueError, OSError, LookupError):  # this machine does not know the zone
        return instant.strftime("%Y-%m-%d %H:%M:%S UTC")
