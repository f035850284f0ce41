"""`core4 return ...`: what jobs have put into their return queues."""

from __future__ import annotations

import json

import click

from core4.console import JSON_OPTION, connect, echo_error, moment, show_rows

NOTHING = 5  # exit code: there was nothing to take
FOREVER = 10 * 365 * 86400.0


@click.group("return")
def returns() -> None:
    """Look into return queues, take out what jobs have put there.

    \b
    Examples:
      core4 job enqueue my_jobs.Report month=1 --return-queue reports
      core4 return pull reports --wait
    """


@returns.command()
@click.argument("queue")
@click.option("--limit", type=click.IntRange(1, 500), default=100, show_default=True)
@JSON_OPTION
def show(queue: str, limit: int, output: str) -> None:
    """List the records of QUEUE, oldest first; they stay there.

    \b
    Example:
      core4 return show nightly
    """
    with connect() as client:
        rows = client.show_queue(queue, limit)
    if output == "table":
        rows = [{**row, "at": moment(row["at"])} for row in rows]
    show_rows(rows, ["at", "job_id", "name", "status"], output)


@returns.command()
@click.argument("queue")
@click.option("--size", type=click.IntRange(1, 500), default=1, show_default=True, help="Records to take.")
@click.option("--wait", is_flag=True, help="Wait until so many are there, however long.")
def pull(queue: str, size: int, wait: bool) -> int:
    """Take records out of QUEUE and print them, one line of JSON each.

    The exit code is 5 if there was none.

    \b
    Examples:
      core4 return pull nightly
      core4 return pull nightly --size 10 --wait
    """
    with connect() as client:
        if wait:
            rows = client.wait_queue(queue, size, FOREVER)
        else:
            rows = client.pull_queue(queue, size, timeout=0.0)
    for row in rows:
        click.echo(json.dumps(row))
    if not rows:
        echo_error(f"return queue {queue} is empty")
    return 0 if rows else NOTHING


@returns.command()
@click.argument("queue")
def reset(queue: str) -> None:
    """Empty QUEUE and print how many records were in it.

    \b
    Example:
      core4 return reset nightly
    """
    with connect() as client:
        click.echo(client.reset_queue(queue))
