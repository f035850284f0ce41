"""`core4 worker` runs workers, `core4 workers` shows all there are, `core4 tmux` those in its windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from core4.console import JSON_OPTION, cell, connect, console, echo_json, load_settings, show_rows

if TYPE_CHECKING:
    from rich.table import Table

    from core4.config import Settings

COLUMNS = "label name type status running slots namespaces pid beat_age timeout error".split()


def _there(_context: click.Context, _parameter: click.Parameter, files: tuple[str, ...]) -> tuple[str, ...]:
    """The files, if they are there. A worker that is up loads what it can, and goes on without the rest."""
    for each in files:
        if (each.endswith(".py") or os.sep in each) and (not os.path.exists(each) or os.path.isdir(each)):
            raise click.BadParameter(f"no such file: {each}; `core4 init FILE` writes a first job file")
    return files


def jobs_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs jobs."""
    for decorate in (
        click.argument("files", nargs=-1, metavar="[FILE]...", callback=_there),
        click.option(
            "-m", "--module", "modules", multiple=True, help="Module or package with jobs; repeatable."
        ),
        click.option("--slots", type=int, help="Jobs that run at the same time.  [default: cores x 2]"),
        click.option("--reload", is_flag=True, default=None, help="Load job files again when they change."),
    ):
        command = decorate(command)
    return command


@click.command()
@jobs_options
@click.option("--name", "worker_name", help="Name of the worker.  [default: worker]")
@click.option("--nr", "worker_nr", type=int, help="Number that it wants.  [default: the lowest free one]")
@click.option("--namespace", "namespaces", multiple=True, help="Namespace to serve; repeatable.")
@click.option("--timeout", "worker_timeout", type=float, help="Longest time of any job on it, in seconds.")
@click.option("--debug", "worker_debug", is_flag=True, default=None, help="Run debug jobs, and no others.")
@click.option("--once", is_flag=True, help="Run one job, then stop.")
@click.option("--processes", type=click.IntRange(1, 1000), help="So many workers, each a child process.")
@click.option(
    "--min", "minimum", type=click.IntRange(1, 1000), help="As many as there is work for, at least."
)
@click.option("--max", "maximum", type=click.IntRange(1, 1000), help="... at most.  [default: 10]")
@click.option("--manager", metavar="URL", help="Work over HTTP for this manager, without a database.")
@click.option("--tmux", "windows", type=click.IntRange(1, 1000), help="So many workers in windows of tmux.")
def worker(
    files: tuple[str, ...],
    modules: tuple[str, ...],
    once: bool,
    processes: int | None,
    minimum: int | None,
    maximum: int | None,
    windows: int | None,
    **overrides: Any,
) -> int:
    """Run a worker in the foreground, on the database of CORE4_MONGO_URL; or several.

    Several in processes of their own run one job each at a time, unless --slots says otherwise. Those with
    --min and --max follow the work: jobs in line and running. Those in tmux go on without this terminal.

    \b
    Examples:
      core4 worker my_jobs.py
      core4 worker -m my.package --slots 8 --namespace reports
      core4 worker my_jobs.py --once
      core4 worker my_jobs.py --processes 5
      core4 worker my_jobs.py --min 1 --max 10
      core4 worker my_jobs.py --tmux 4
      CORE4_WORKER_SECRET=... core4 worker my_jobs.py --manager http://manager:5001 --processes 5
    """
    dynamic = minimum is not None or maximum is not None
    if sum((once, processes is not None, dynamic, windows is not None)) > 1:
        raise click.UsageError("only one of --once, --processes, --min/--max, --tmux")
    if once:
        overrides["worker_jobs"] = 1
    settings = load_settings(jobs=files + modules, **overrides)
    if settings.manager is not None and (dynamic or windows is not None):
        raise click.UsageError("that looks into the database: with --manager use --processes")
    if settings.manager is not None and settings.worker_secret is None:
        raise click.UsageError("--manager needs CORE4_WORKER_SECRET: the secret that the manager was given")
    if windows is not None:
        return _open_windows(settings, windows)
    from core4.embedded import database_url
    from core4.service import setup_logging

    setup_logging(settings.log_level, settings.log_format)
    from core4 import worker as side

    if settings.manager is not None:
        settings = replace(settings, mongo_url=None, broker_url=None)
        return side.main(settings) if processes is None else _run_pool(settings, processes, processes)
    with database_url(settings) as url:
        settings = replace(settings, mongo_url=url)
        if processes is not None or dynamic:
            return _run_pool(settings, processes or minimum or 1, processes or maximum or 10)
        return side.main(settings)


def _run_pool(settings: Settings, minimum: int, maximum: int) -> int:
    if minimum > maximum:
        raise click.UsageError(f"--min is {minimum}, --max only {maximum}")
    from core4.pool import Children, Size, supervise

    return supervise(settings, Size(minimum, maximum), Children(settings))


def _open_windows(settings: Settings, count: int) -> int:
    from core4.tmux import Windows

    opened = Windows(settings.home).open(settings, count)
    click.echo(
        f"{count} workers in tmux" if opened else f"the windows are there; {count} workers from now on"
    )
    click.echo("look at them with `core4 tmux attach`, end them with `core4 tmux stop`")
    return 0


@click.group()
def tmux() -> None:
    """The workers that `core4 worker --tmux N` runs in windows of tmux.

    \b
    Examples:
      core4 tmux list
      core4 tmux attach w2
      core4 tmux stop
    """


@tmux.command("list")
@JSON_OPTION
def tmux_list(output: str) -> None:
    """List the windows, and the processes in them.

    \b
    Example:
      core4 tmux list
    """
    from core4.tmux import Windows

    windows = Windows(load_settings().home)
    windows._require()
    rows = [{"window": each.name, "pid": each.pid, "ended": each.dead} for each in windows.all()]
    show_rows(rows, ["window", "pid", "ended"], output, f"tmux -L {windows.socket}")


@tmux.command("attach")
@click.argument("window", default="supervisor")
def tmux_attach(window: str) -> None:
    """Show the windows in this terminal; Ctrl-B N is the next one, Ctrl-B D leaves them.

    \b
    Example:
      core4 tmux attach w1
    """
    from core4.tmux import Windows

    command = Windows(load_settings().home).attach(window)
    os.execvp(command[0], command)


@tmux.command("stop")
@click.option("--now", is_flag=True, help="Do not wait for running jobs: they go back in line.")
def tmux_stop(now: bool) -> None:
    """End the workers in the windows, and the windows.

    \b
    Example:
      core4 tmux stop
    """
    from core4.tmux import Windows

    settings = load_settings()
    ended = Windows(settings.home).close(settings.drain + settings.grace, now=now)
    click.echo("stopped" if ended else "there are no windows")


@tmux.command("supervise", hidden=True)
def tmux_supervise() -> int:
    """What runs in the first window: it keeps the others up.

    \b
    Example:
      core4 tmux supervise
    """
    from core4.service import setup_logging
    from core4.tmux import supervise_windows

    settings = load_settings()
    setup_logging(settings.log_level, settings.log_format)
    return supervise_windows(settings)


@click.group("workers", invoke_without_command=True)
@click.option("--all", "every", is_flag=True, help="Those that have ended, too.")
@click.option("--once", is_flag=True, help="Show them once, also at a terminal.")
@click.option("--every", "pause", type=click.FloatRange(0.1), default=1.0, help="Seconds between two looks.")
@JSON_OPTION
@click.pass_context
def workers(context: click.Context, every: bool, once: bool, pause: float, output: str) -> None:
    """Show the workers that are up and what they do: at a terminal until Ctrl-C.

    \b
    Examples:
      core4 workers
      core4 workers --all -o json
      core4 workers halt w3
    """
    if context.invoked_subcommand:
        return
    if once or output == "json" or not console().is_terminal:
        rows = _rows(every)
        if output == "json":
            echo_json(rows)
        else:
            show_rows(list(map(_shown, rows)), COLUMNS, output)
        return
    _watch(every, pause)


def _rows(every: bool) -> list[Mapping[str, Any]]:
    with connect() as client:
        return [row for row in client.workers() if every or row["state"] in ("new", "up", "drain")]


def _watch(every: bool, pause: float) -> None:
    import time

    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(console=console(), auto_refresh=False) as live:
        while True:
            live.update(_table(map(_shown, _rows(every))), refresh=True)
            time.sleep(pause)


def _table(rows: Iterable[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption="Ctrl-C ends this", caption_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell(row.get(column))) for column in COLUMNS))
    return table


def _shown(row: Mapping[str, Any]) -> Mapping[str, Any]:
    marks = [
        *(["paused"] if row.get("paused") else []),
        *(["debug"] if row.get("debug") else []),
        *(["gate"] if row.get("gate") else []),
        *(["ending"] if row["state"] == "drain" else []),
    ]
    said = row.get("error") or row.get("gate") or "; ".join(row.get("broken") or ())
    return {
        **row,
        "status": ", ".join([row["status"], *marks]),
        "running": len(row["current"]),
        "error": said,
    }


def _stop(name: str, *, hard: bool, reason: str | None) -> None:
    with connect() as client:
        rows = [row for row in client.workers() if name in (row["_id"], row["label"])]
        living = [row for row in rows if row["state"] in ("new", "up", "drain")]
        if not living:
            raise click.UsageError(f"no worker {name} is up; `core4 workers` shows which are")
        client.halt_worker(living[0]["_id"], hard=hard, reason=reason)
    click.echo(f"{name} ends" + ("" if hard else " when its jobs have ended"))


@workers.command("halt")
@click.argument("name")
@click.option("--reason", help="Why; told to whoever asks.")
def workers_halt(name: str, reason: str | None) -> None:
    """Let a worker end when the jobs that it runs have ended, however long that takes.

    \b
    Example:
      core4 workers halt w3
    """
    _stop(name, hard=False, reason=reason)


@workers.command("stop")
@click.argument("name")
@click.option("--reason", help="Why; told to whoever asks.")
def workers_stop(name: str, reason: str | None) -> None:
    """End a worker at once; its jobs go back in line, those that may run only once end as HALTED.

    \b
    Example:
      core4 workers stop w3
    """
    _stop(name, hard=True, reason=reason)
