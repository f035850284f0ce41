"""The shape of the house: who may import whom, who writes what, and what stays out of a job's process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOLDERS = {"core": "core4", "api": "core4.api", "worker": "core4.worker"}

# From the bottom up; a module may import what stands in its own row or below. docs/contributing.rst draws it.
LAYERS = (
    (
        "words",
        "errors states options jobs results retries chains transitions schemas permissions filters bookmarks "
        "handshake signatures cron timetable orders sanity findings messages sources functions",
    ),
    ("ground", "config faults database changes waits remembered service embedded identifiers"),
    (
        "stores",
        "controls events returns store spans outbox claims queues repairs retention bulk catalogue registry "
        "logs users schedules doctor brokers inbox rabbit children actions attendance",
    ),
    ("authors", "tasks decorated scripts questions context attempts discovery testing examples producers"),
    ("sides", "api worker"),
    (
        "doors",
        "manager timers cli stack running client handles callers callers_async console display demo __main__ "
        "commands_authors commands_batch commands_bulk commands_control commands_doctor commands_events "
        "commands_functions commands_jobs commands_returns commands_schedules commands_workers "
        "pool tmux workers",
    ),
)
RANK = {module: rank for rank, (_, modules) in enumerate(LAYERS) for module in modules.split()}

DRIVERS = {"pymongo", "bson", "motor", "asyncio"}
SLIM = (
    "core4",
    "core4.tasks",
    "core4.context",
    "core4.examples",
    "core4.scripts",
    "core4.worker.launcher",
    "core4.worker.process",
    # What the command line loads to ask the API.
    "core4.cli",
    "core4.client",
    "core4.display",
    "core4.running",
)


def name_of(path: Path) -> str:
    """The name a module is imported by: core/jobs.py is core4.jobs."""
    inner = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[inner[0]], *(part for part in inner[1:] if part != "__init__")]
    return ".".join(parts)


# What lies in core/data makes the files that are shipped; it is not shipped itself.
SOURCES = {
    name_of(path): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent.name != "data"
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def layer(module: str) -> str:
    """What stands in the table for this module: its first word below core4."""
    return module.removeprefix("core4").removeprefix(".").partition(".")[0]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that `module` imports, anywhere in its code, with the line."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [each if (each := f"{base}.{a.name}") in SOURCES else base for a in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.partition(".")[0] == "core4")


def test_every_module_has_its_place() -> None:
    """A new module must be put into the table of layers, and the table names none that is gone."""
    modules = {layer(module) for module in SOURCES} - {""}

    assert modules - set(RANK) == set()
    assert set(RANK) - modules == set()


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"core4"}))
def test_imports_point_down(module: str) -> None:
    """No module imports from a layer above its own; `api` and `worker` never import each other."""
    own = layer(module)
    wrong = [
        f"{SOURCES[module].name}:{line} imports {name}"
        for name, line in imports(module)
        if name != "core4" and (RANK[layer(name)] > RANK[own] or {own, layer(name)} == {"api", "worker"})
    ]

    assert wrong == []


def test_only_one_module_knows_the_driver() -> None:
    """motor is imported in core4.database and nowhere else."""
    users = {
        module
        for module in SOURCES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
        if name.partition(".")[0] == "motor"
    }

    assert users == {"core4.database"}


def test_each_collection_is_named_in_one_module() -> None:
    """One module writes a collection; whoever else needs its name imports it from there."""
    owners: dict[str, set[str]] = {}
    for module in SOURCES:
        for node in ast.walk(tree(module)):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"sys\.[a-z]+", text):
                owners.setdefault(text, set()).add(module)

    assert {collection: names for collection, names in owners.items() if len(names) > 1} == {}


def test_every_folder_with_code_is_packaged() -> None:
    """A folder of modules is listed in pyproject.toml, or the wheel lacks it."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        f"{FOLDERS[path.relative_to(ROOT).parts[0]]}"
        + "".join(f".{p}" for p in path.relative_to(ROOT).parts[1:-1])
        for path in SOURCES.values()
    }

    assert folders == set(packages)


@pytest.mark.parametrize("module", SLIM)
def test_a_jobs_process_loads_no_driver(module: str) -> None:
    """Neither a database driver nor asyncio comes with what a job's author imports."""
    assert loaded_by(f"import {module}\nfrom core4 import CoreJob") & DRIVERS == set()


def test_a_worker_with_a_database_loads_no_http() -> None:
    """It would start half as fast."""
    assert "aiohttp" not in loaded_by("import core4.cli, core4.worker.entry")


def loaded_by(script: str) -> set[str]:
    """The modules that are there when a fresh interpreter has run this."""
    asked = f"import sys\n{script}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
