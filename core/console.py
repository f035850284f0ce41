"""What the commands share: settings, the connection to the API, output as table or JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from core4.client import Client
    from core4.config import Settings

USAGE = 2
UNREACHABLE = 69

JSON_OPTION = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Table for people, JSON for scripts.",
)

Row = Mapping[str, Any]


def load_settings(**overrides: Any) -> Settings:
    """The settings of the running command. Raises ConfigError."""
    from core4.config import Settings

    return Settings.load(click.get_current_context().find_root().obj, **overrides)


def connect() -> Client:
    """The API as the environment names it, else the stack that runs on the data folder.

    That stack's default user is known to everybody, so it need not be typed.
    """
    from core4.client import Client
    from core4.config import DEFAULT_USER
    from core4.running import running_stack

    given = any(map(os.environ.get, ("CORE4_USER", "CORE4_TOKEN", "CORE4_PASSWORD")))
    stack = None if os.environ.get("CORE4_URL") else running_stack(load_settings().home)
    url = str(stack["url"]) if stack else None
    if not given and stack and stack["default_user"]:
        return Client(url, DEFAULT_USER)
    return Client(url, _typed_password())


def _typed_password() -> tuple[str, str] | None:
    user = os.environ.get("CORE4_USER")
    if (
        not user
        or os.environ.get("CORE4_PASSWORD")
        or os.environ.get("CORE4_TOKEN")
        or not sys.stdin.isatty()
    ):
        return None
    return user, click.prompt(f"Password for {user}", hide_input=True, err=True)


def arguments(items: Sequence[str]) -> dict[str, Any]:
    """Job arguments from `key=value` words (values as JSON, else as text) or from one JSON object.

    Raises:
        UsageError: an item is neither.
    """
    if len(items) == 1 and items[0].lstrip().startswith("{"):
        given = json_value(items[0])
        if not isinstance(given, dict):
            raise click.UsageError("the arguments are no JSON object")
        return given
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise click.UsageError(f"argument {item!r} does not look like key=value")
        if key in found:
            raise click.UsageError(f"argument {key} is given twice")
        found[key] = json_value(value)
    return found


def json_value(text: str) -> Any:
    """`text` as JSON; as it is if it is none."""

    def refuse(name: str) -> Any:
        raise ValueError(name)  # NaN and Infinity are no JSON

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


def echo_error(message: str) -> None:
    """One error for the user."""
    click.echo(f"Error: {printable(message)}", err=True)


def echo_json(value: Any) -> None:
    """`value` as indented JSON."""
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=not _utf8()))


def show_rows(rows: Iterable[Row], columns: Sequence[str], output: str, caption: str = "") -> None:
    """Rows as a table with these columns, or whole as a JSON list."""
    if output == "json":
        echo_json(list(rows))
        return
    from rich.table import Table

    view = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        view.add_column(column.lstrip("_"), overflow="fold", no_wrap=column == "_id")
    for row in rows:
        view.add_row(*(cell(row.get(column)) for column in columns))
    out = console()
    out.print(view)
    if caption:
        out.print(caption, style="dim", markup=False, highlight=False)


def console(*, stderr: bool = False) -> Console:
    """Where tables go: as wide as the terminal, and not cut at all in a file or pipe."""
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # not rich's exit code: `main` has one for it

    stream = sys.stderr if stderr else sys.stdout
    return QuietConsole(file=stream, width=None if stream.isatty() else 240)


def cell(value: Any) -> Any:
    """A value as text of a table's cell, without markup."""
    from rich.text import Text

    if value is None:
        return Text("")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, float):
        return Text(f"{value:.3f}".rstrip("0").rstrip("."))
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return Text(printable(", ".join(value)))
    text = (
        json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    )
    return Text(printable(text))


def printable(text: str) -> str:
    """`text` without characters that steer a terminal: what a job writes is only shown."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def moment(text: str | None) -> str:
    """An API time (UTC) as local time."""
    if not text:
        return ""
    return parse_time(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def parse_time(text: str) -> datetime:
    """An API time as an aware datetime."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


Command = Callable[..., Any]
