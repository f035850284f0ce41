"""Sphinx extension: writes docs/generated/*.rst from the tables in the code, before a build reads them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from marshmallow import Schema
from sphinx.application import Sphinx

from core4 import timetable
from core4.api.routes import ROUTES, Route
from core4.cli import core4 as command_line
from core4.config import FIELDS, OTHER_VARIABLES
from core4.filters import (
    CATALOGUE_FIELDS,
    EVENT_FIELDS,
    JOB_FIELDS,
    LOG_FIELDS,
    OPERATORS,
    SCHEDULE_FIELDS,
    Field,
)
from core4.findings import KINDS
from core4.options import OPTIONS
from core4.schemas import ScheduleValue
from core4.states import FINAL, MOVES, STOPPED, Move, State, highstate
from core4.tasks import DECLARATIONS, NOT_INHERITED


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_all)
    return {"parallel_read_safe": True}


def write_all(app: Sphinx) -> None:
    """Write every generated file that is new or different."""
    folder = Path(app.srcdir) / "generated"
    folder.mkdir(exist_ok=True)
    for name, lines in {
        "settings": settings(),
        "variables": variables(),
        "states": states(),
        "moves": moves(),
        "options": options(),
        "declarations": declarations(),
        "schedule": schedule(),
        "routes": routes(),
        "arguments": arguments(),
        "filters": filters(),
        "findings": findings(),
        "cli": cli(),
    }.items():
        text = "\n".join(lines) + "\n"
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def table(widths: Sequence[int], head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A list-table."""
    yield from (".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", "")
    for row in (head, *rows):
        for index, cell in enumerate(row):
            first, *rest = (cell or "-").splitlines()
            yield f"   {'* -' if index == 0 else '  -'} {first}"
            yield from (f"       {line}" for line in rest)
    yield ""


def code(value: object) -> str:
    """A value as literal text; nothing for nothing."""
    return f"``{value}``" if value not in ("", None) else ""


def settings() -> Iterator[str]:
    rows = (
        (
            code(row.variable),
            _default(row.default),
            row.unit,
            f"{_plain(row.doc)} Accepted: {_plain(row.accepts)}.",
        )
        for row in FIELDS.values()
    )
    return table((28, 14, 8, 50), ("Variable", "Default", "Unit", "Meaning"), rows)


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return code(",".join(value)) or "empty"
    return code(f"{value:g}" if isinstance(value, float) else value)


def _plain(text: str) -> str:
    # What the code writes between single backquotes is literal text here.
    return text.replace("`", "``").replace("*", "\\*")


def variables() -> Iterator[str]:
    rows = ((code(name), _plain(doc)) for name, doc in OTHER_VARIABLES.items())
    return table((30, 70), ("Variable", "Meaning"), rows)


def states() -> Iterator[str]:
    def row(state: State) -> tuple[str, ...]:
        moves = [move for move in MOVES.values() if state in move.sources and not _keeps(move)]
        to = sorted({target.value for move in moves for target in move.targets} - {state.value})
        kind = "final" if state in FINAL else "open"
        return (
            code(state.value),
            kind + (", stays in the queue" if state in STOPPED else ""),
            highstate(state) or "-",
            ", ".join(map(code, to)),
        )

    return table((15, 25, 15, 45), ("State", "Kind", "Highstate", "Next"), map(row, State))


def moves() -> Iterator[str]:
    rows = (
        (
            code(name),
            _states(move.sources),
            "the same" if _keeps(move) else _states(move.targets),
            "the holder of the lease" if move.held else "anybody",
        )
        for name, move in MOVES.items()
    )
    return table((15, 30, 35, 20), ("Move", "From", "To", "Made by"), rows)


def _keeps(move: Move) -> bool:
    """True for a move that leaves the state as it is."""
    return move.sources == move.targets


def _states(found: frozenset[State]) -> str:
    return ", ".join(code(state.value) for state in State if state in found)


def options() -> Iterator[str]:
    rows = ((code(name), _value(option.default), _plain(option.accepts)) for name, option in OPTIONS.items())
    return table((25, 20, 55), ("Option", "Default", "Accepted"), rows)


def declarations() -> Iterator[str]:
    rows = (
        (
            code(name),
            _value(option.default),
            _plain(option.accepts),
            "no" if name in (*NOT_INHERITED, "qual_name") else "yes",
        )
        for name, option in DECLARATIONS.items()
    )
    return table((20, 20, 45, 15), ("Attribute", "Default", "Accepted", "Inherited"), rows)


def schedule() -> Iterator[str]:
    rows = (
        (code(name), _value(field.default), _plain(field.accepts)) for name, field in timetable.FIELDS.items()
    )
    return table((20, 20, 60), ("Field", "Default", "Accepted"), rows)


def _value(value: Any) -> str:
    return code({None: "null", True: "true", False: "false"}.get(value, value) if _is_word(value) else value)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def findings() -> Iterator[str]:
    rows = (
        (code(name), _plain(kind.meaning), _plain(kind.repair or ""), _plain(kind.advice or ""))
        for name, kind in KINDS.items()
    )
    return table((15, 35, 25, 25), ("Kind", "What it is", "What a repair does", "What you can do"), rows)


ACCESS = {"open": "everybody", "user": "signed in", "stream": "signed in, or a ticket"}


def routes() -> Iterator[str]:
    rows = (
        (
            f"{code(route.method)} {code(re.sub(r':[^/]*(?=})', '', route.path))}",
            _summary(route),
            ACCESS[route.access],
            _arguments_of(route),
        )
        for route in ROUTES
        if route.method != "*"
    )
    return table((34, 34, 12, 20), ("Address", "What it does", "Who", "Arguments"), rows)


def _summary(route: Route) -> str:
    text = inspect.getdoc(route.handler) or ""
    first = text.split("\n\n")[0].replace("\n", " ")
    _, colon, rest = first.partition(": ")
    return _plain(rest if colon else first)


def _arguments_of(route: Route) -> str:
    return route.takes.__name__ if route.takes().fields else ""


def arguments() -> Iterator[str]:
    schemas: Mapping[str, type[Schema]] = {
        route.takes.__name__: route.takes for route in ROUTES if route.takes().fields
    }
    for name, schema in schemas.items():
        yield from (f"``{name}``: {inspect.getdoc(schema)}", "")
        rows = (
            (code(argument), _type(field), _load_default(field))
            for argument, field in schema().fields.items()
        )
        yield from table((30, 40, 30), ("Argument", "Type", "Default"), rows)


def _type(field: Any) -> str:
    table = timetable.FIELDS if isinstance(field, ScheduleValue) else OPTIONS
    if option := table.get(field.name):
        return _plain(option.accepts)
    return code(field.as_type)


def _load_default(field: Any) -> str:
    if field.required:
        return "required"
    default = field.load_default() if callable(field.load_default) else field.load_default
    if field.name in OPTIONS:
        return "what the class declares"
    return "none" if repr(default) == "<marshmallow.missing>" else code(_json(default)) or "empty"


def _json(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def filters() -> Iterator[str]:
    yield f"Operators: {', '.join(map(code, OPERATORS))}."
    yield ""
    rows = (
        (name, ", ".join(map(code, sorted(fields))))
        for name, fields in (
            ("queue and journal", [*JOB_FIELDS, "args.PATH"]),
            ("catalogue (``job/list``)", list(CATALOGUE_FIELDS)),
            ("schedules (``schedule``)", list(SCHEDULE_FIELDS)),
            ("log lines", list(LOG_FIELDS)),
            ("audit (``event``)", list(EVENT_FIELDS)),
        )
    )
    yield from table((25, 75), ("Listing", "Fields"), rows)
    private = sorted(name for name, field in JOB_FIELDS.items() if _is_private(field))
    yield f"Private fields: {', '.join(map(code, [*private, 'args.PATH']))}."
    yield ""


def _is_private(field: Field) -> bool:
    return field.private


def cli() -> Iterator[str]:
    yield from _command(command_line, "core4", None)


def _command(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent, max_content_width=100)
    yield from (path, "~" * len(path), "", ".. code-block:: text", "")
    yield from (f"   {line}".rstrip() for line in command.get_help(context).splitlines())
    yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _command(child, f"{path} {name}", context)
