"""Every write the product makes to the database, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from core4.faults import WRITES, Hit
from tests.helpers import ROOT

# Nothing but the stores writes; what lies elsewhere has to be found, too.
FOLDERS = {"core": "", "api": "api.", "worker": "worker."}
# What it tries on a database of its own, before the product uses the server, is no store's.
TRIALS = {"frees_keys"}


def writes() -> list[Hit]:
    """All calls of write methods, as the fault switch names them."""
    found = []
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for function, call in _calls(tree, ""):
                assert isinstance(call.func, ast.Attribute)
                if function not in TRIALS:
                    found.append(Hit(prefix + path.stem, function, call.func.attr, call.lineno))
    return found


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if (
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Attribute)
            and child.func.attr in WRITES
        ):
            yield inner, child
        yield from _calls(child, inner)
