"""`core4 function ...`: the functions that were sent as source, and keys to sign them with."""

from __future__ import annotations

import re
import secrets

import click

from core4.console import JSON_OPTION, connect, echo_json, moment, show_rows
from core4.permissions import KEY_NAME

MOST_ROWS = 500  # of one page of the API
COLUMNS = ["key", "methodname", "actorname", "by", "created", "used", "revoked"]


@click.group()
def function() -> None:
    """See and revoke functions that were sent as source, and make keys to sign them.

    \b
    Examples:
      core4 function list
      core4 function revoke 3b4c...
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
    """List the functions that were sent, newest first.

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
    """Show a function: its source, who sent and signed it.

    \b
    Example:
      core4 function show 3b4c...
    """
    from core4.callers import Functions

    with connect() as client:
        found = Functions(client).action(key)
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
    """Let a function run no more, whoever signed it. Jobs that wait for it end in error.

    \b
    Example:
      core4 function revoke 3b4c... --reason "reads what it should not"
    """
    from core4.callers import Functions

    with connect() as client:
        found = Functions(client).revoke(key, reason)
    click.echo(f"{found['methodname']} is revoked by {found['revoked']['by']}")
