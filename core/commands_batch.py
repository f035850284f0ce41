"""`core4 job batch`: many jobs from a file, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

import click

from core4.console import USAGE, connect, echo_error

# Jobs in one request, and the size of their lines: well below the 1 MiB that an API accepts by default.
MOST_JOBS, MOST_TEXT = 500, 400_000

Wish = tuple[int, dict[str, Any]]


@click.command()
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--namespace", help="Namespace of those that name none.")
@click.option(
    "-o", "--output", type=click.Choice(["id", "json"]), default="id", help="What to print per job."
)
def batch(file: IO[str], namespace: str | None, output: str) -> int:
    """Put the jobs of FILE (- is stdin) into the queue: one JSON object a line; prints their ids.

    A line has qual_name, args, options like priority, and perhaps a key: under the same key a job is made
    once, so that the file can be sent again. Refused lines are named; the exit code is 2 then.

    \b
    Examples:
      core4 job batch jobs.ndjson
      printf '{"qual_name": "my_jobs.Report", "args": {"month": "2026-01"}}' | core4 job batch -
    """
    # All of it is read before anything is sent: half a file is worse than none.
    groups = list(_grouped(file, {"namespace": namespace} if namespace else {}))
    refused = 0
    with connect() as client:
        for some in groups:
            outcomes = client.enqueue_many([wish for _, wish in some])
            for (line, _), outcome in zip(some, outcomes, strict=True):
                if outcome["outcome"] == "refused":
                    refused += 1
                    echo_error(f"line {line}: {outcome['detail']}")
                if output == "json":
                    click.echo(json.dumps({"line": line, **outcome}))
                elif outcome["outcome"] != "refused":
                    click.echo(outcome["_id"])
            for warning in client.flash:
                echo_error(warning)
    return USAGE if refused else 0


def _grouped(file: IO[str], defaults: Mapping[str, Any]) -> Iterator[list[Wish]]:
    """Jobs with the numbers of their lines, as many as go into one request."""
    some: list[Wish] = []
    size = 0
    for number, line in _lines(file):
        if some and (len(some) == MOST_JOBS or size + len(line) > MOST_TEXT):
            yield some
            some, size = [], 0
        some.append((number, {**defaults, **_wish(number, line)}))
        size += len(line)
    if some:
        yield some


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    try:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file.name} is not UTF-8: {error.reason}") from None


def _wish(number: int, line: str) -> dict[str, Any]:
    """Raises: UsageError for a line that is no job."""
    try:
        wish = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"line {number} is not JSON: {error}") from None
    if not isinstance(wish, dict):
        raise click.UsageError(f"line {number} is JSON, but no object")
    return wish
