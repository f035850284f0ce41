"""`core4 function ...`: the functions that were sent as source, and keys to sign them with."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from core4.console import JSON_OPTION, connect, echo_json, moment, show_rows
from core4.permissions import KEY_NAME

if TYPE_CHECKING:
    from core4.callers import Functions

MOST_ROWS = 500  # of one page of the API
LEAST = 6  # digits by which a key may be named
COLUMNS = ["key", "methodname", "actorname", "by", "created", "used", "revoked"]


@click.group()
def function() -> None:
    """See and revoke functions that were sent as source, and make keys to sign them.

    \b
    Examples:
      core4 function list
      core4 function revoke 3b4c1f
    """


@function.command()
@click.argument("name")
def key(name: str) -> None:
    """Make a key: CORE4_FUNCTION_KEY of who sends functions, one of CORE4_FUNCTION_KEYS of who runs them.

    \b
    Example:
      core4 function key ann
    """
    if not re.fullmatch(KEY_NAME, name):
        raise click.UsageError("a key's name has 1 to 50 of A-Z a-z 0-9 . _ -")
    click.echo(f"{name}:{secrets.token_urlsafe(32)}")


@function.command("list")
@JSON_OPTION
def list_(output: str) -> None:
    """List the functions that were sent, newest first. `used`: last scheduled, to the minute.

    \b
    Example:
      core4 function list -o json
    """
    from core4.callers import Functions

    with connect() as client:
        rows = Functions(client).actions(per_page=MOST_ROWS)
    if output == "json":
        echo_json(rows)
        return
    shown = [
        {
            **row,
            "by": row["created_by"],
            "created": moment(row["created"]),
            "used": moment(row["used_at"]),
            "revoked": f"by {row['revoked']['by']}" if row["revoked"] else "",
        }
        for row in rows
    ]
    show_rows(shown, COLUMNS, output)


@function.command()
@click.argument("key")
@JSON_OPTION
def show(key: str, output: str) -> None:
    """Show a function: its source, who sent and signed it. Of KEY 6 digits are enough if no other begins so.

    \b
    Example:
      core4 function show 3b4c1f
    """
    from core4.callers import Functions

    with connect() as client:
        functions = Functions(client)
        found = _of_key(functions, key, functions.action)
    if output == "json":
        echo_json(found)
        return
    signed = ", ".join(f"{each['by']} with key {each['signer']}" for each in found["signatures"])
    click.echo(f"{found['key']}  signed by {signed}")
    if found["revoked"]:
        click.echo(f"revoked by {found['revoked']['by']}: {found['revoked']['reason'] or 'no reason given'}")
    click.echo(found["code"], nl=False)


@function.command()
@click.argument("key")
@click.option("--reason", help="Why; told to whoever sends it again.")
def revoke(key: str, reason: str | None) -> None:
    """Let a function run no more, whoever signed it. Jobs that wait for it end in error. KEY as for `show`.

    \b
    Example:
      core4 function revoke 3b4c1f --reason "reads what it should not"
    """
    from core4.callers import Functions

    with connect() as client:
        functions = Functions(client)
        found = _of_key(functions, key, lambda whole: functions.revoke(whole, reason))
    click.echo(f"{found['methodname']} is revoked by {found['revoked']['by']}")


def _of_key(functions: Functions, key: str, do: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `do` says of the function whose key this is, or the only one whose key begins so."""
    from core4.client import ApiError

    try:
        return do(_whole(functions, key.lower()) if re.fullmatch("[0-9A-Fa-f]{1,63}", key) else key)
    except ApiError as error:
        if error.status != 404:
            raise
        raise click.UsageError(f"{error.detail}; `core4 function list` shows the keys") from None


def _whole(functions: Functions, start: str) -> str:
    if len(start) < LEAST:
        raise click.UsageError(
            f"of a key {LEAST} digits are needed at least; `core4 function list` shows them"
        )
    found: list[str] = []
    page = 0
    while rows := functions.actions(page, per_page=MOST_ROWS):
        found += [row["key"] for row in rows if row["key"].startswith(start)]
        page += 1
        if len(rows) < MOST_ROWS:
            break
    if not found:
        raise click.UsageError(f"function [{start}] not found; `core4 function list` shows the keys")
    if len(found) > 1:
        raise click.UsageError(f"{len(found)} keys begin with {start}: {', '.join(found[:3])}")
    return found[0]
