"""For those who write jobs: `core4 init` makes a first file, `core4 run` runs a job without any server."""

from __future__ import annotations

import logging
import pdb
import sys
import traceback
from pathlib import Path

import click

from core4.console import arguments, echo_json, load_settings
from core4.display import line_text
from core4.errors import Core4Error

FIRST_JOB = '''\
"""My first jobs. Serve them with `core4 up {file} --reload`; changes take effect when the file is saved."""

from __future__ import annotations

import time

from core4 import CoreJob


class Hello(CoreJob):
    """Greet somebody, one letter after the other."""

    author = "me"
    attempts = 2  # executions before it ends as error
    error_time = 5  # seconds between them
    progress_interval = 1  # seconds between two reports of progress

    def execute(self, name: str = "world", pause: float = 0.5) -> dict[str, str]:
        # The parameters are the job's arguments; what is returned is its result.
        greeting = f"Hello, {{name}}!"
        for count, letter in enumerate(greeting, start=1):
            self.logger.info("wrote %r", letter)
            self.progress(count / len(greeting), "%d of %d letters", count, len(greeting))
            time.sleep(pause)
        return {{"greeting": greeting}}
'''


SUBPROCESS_FILE = '''\
"""The body of the task `{name}`, which says subprocess=True: run in a fresh interpreter for each job."""

from core4 import subprocess


@subprocess
def work(a, b, c):
    """
    insert blocking / non-blocking work here
    """
    # The name of this function is free, and it may be `async def`; its parameters are those of the task.
    return {{"result": f"blocking with {{a}} {{b}} {{c}}"}}


if __name__ == "__main__":
    work()
'''


@click.command()
@click.argument("file", default="my_jobs.py", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--subprocess", is_flag=True, help="Write the file of a task with subprocess=True instead.")
def init(file: Path, subprocess: bool) -> None:
    """Write a first job file, to be read and changed.

    \b
    Examples:
      core4 init my_jobs.py
      core4 init --subprocess task_files/basic_blocking.py
    """
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise click.UsageError(f"{file} is no name of a Python module; take one like my_jobs.py")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write((SUBPROCESS_FILE if subprocess else FIRST_JOB).format(file=file, name=file.stem))
    except FileExistsError:
        raise click.UsageError(f"{file} exists; it is left as it is") from None
    except FileNotFoundError:
        raise click.UsageError(f"there is no folder {file.parent}: make it first") from None
    except OSError as error:
        raise click.UsageError(f"{file}: {(error.strerror or str(error)).lower()}") from None
    click.echo(f"{file} is written. Next:\n{(_next_of_file if subprocess else _next_of_jobs)(file)}")


def _next_of_file(file: Path) -> str:
    return (
        f"  export WORKER_TASK_DIR={file.parent.absolute()}\n"
        f"  in your module of tasks: @task(subprocess=True) above def {file.stem}(a, b, c): pass"
    )


def _next_of_jobs(file: Path) -> str:
    return (
        f"  core4 run {file.stem}.Hello name=Ada   # here, without any server\n"
        f"  core4 up {file} --reload   # the whole system, in one terminal\n"
        f"  core4 job enqueue {file.stem}.Hello name=Ada --follow   # in another one"
    )


@click.command()
@click.argument("name")
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-m", "--module", "modules", multiple=True, help="Module or file with the job; repeatable.")
@click.option("--debug", is_flag=True, help="Open the debugger where the job fails.")
def run(name: str, args: tuple[str, ...], modules: tuple[str, ...], debug: bool) -> int:
    """Run a job class here and now, in the foreground, without database or server.

    A task is a function: call it in Python.

    \b
    Examples:
      core4 run my_jobs.Hello name=Ada
      core4 run my_jobs.Hello '{"name": "Ada"}' -m jobs/my_jobs.py --debug
    """
    from core4.discovery import resolve
    from core4.testing import run_job

    # As for `python FILE`; at the end, so that a file here hides nobody else's module.
    sys.path.append(str(Path.cwd()))
    job_class, given = resolve(name, load_settings(jobs=modules).jobs), arguments(args)
    logging.getLogger().setLevel(logging.INFO)
    try:
        outcome = run_job(job_class, given, debug=debug, on_log=_show_record)
    except Core4Error:
        raise
    except Exception as error:
        if not debug:
            raise
        traceback.print_exception(error)
        pdb.post_mortem(error.__traceback__)
        return 1
    if outcome.state == "complete":
        echo_json(outcome.result)
        return 0
    click.echo("\n".join(line.rstrip("\n") for line in outcome.traceback), err=True)
    click.echo(f"{outcome.state}: {outcome.error}", err=True)
    return 1


def _show_record(record: logging.LogRecord) -> None:
    line = {"epoch": record.created, "level": record.levelname, "message": record.getMessage()}
    click.echo(line_text(line), err=True)
