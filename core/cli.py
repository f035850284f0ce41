"""The command line: `core4 up`, the daemons, settings and users; `core4 job ...` is in commands_jobs.

Exit codes: 0 fine, or the job is complete; 1 the job ended as error, or something broke; 2 bad usage,
refused, or unknown; 3 the job was killed; 4 it became inactive; 5 it has no result yet; 69 the API cannot
be reached; 130 stopped or detached by Ctrl-C. Heavy modules are imported in the commands, so that help is
quick.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from core4.commands_authors import init, run
from core4.commands_control import controls, halt, pause, resume
from core4.commands_doctor import doctor
from core4.commands_events import counts, events
from core4.commands_functions import function
from core4.commands_jobs import job
from core4.commands_returns import returns
from core4.commands_schedules import schedule
from core4.commands_workers import jobs_options, tmux, worker, workers
from core4.console import JSON_OPTION, UNREACHABLE, USAGE, echo_error, load_settings, show_rows
from core4.errors import ConfigError, Core4Error

if TYPE_CHECKING:
    from core4.config import Settings
    from core4.stack import Stack
    from core4.users import UserStore

T = TypeVar("T")

SHORT_PASSWORD = 8  # characters; below it is a warning
BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
DETACHED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Every failure is one clear message."""
    try:
        result = core4.main(args, prog_name="core4", standalone_mode=False)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        return DETACHED
    except BrokenPipeError:
        # The interpreter would complain about the same pipe once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except click.ClickException as error:
        error.show()
        return USAGE
    except Core4Error as error:
        echo_error(error.detail)
        return 1 if error.status >= 500 and not isinstance(error, ConfigError) else USAGE
    except Exception as error:
        code = _unreachable(error)
        if code is None:
            raise
        return code
    return result if isinstance(result, int) else 0


def _unreachable(error: Exception) -> int | None:
    """Report what the API or the database said; None if `error` is neither's."""
    from pymongo.errors import PyMongoError

    from core4.client import ApiError, Unreachable
    from core4.service import masked

    if isinstance(error, Unreachable):
        echo_error(str(error))
    elif isinstance(error, ApiError):
        echo_error(str(error))
        return USAGE if error.status < 500 else UNREACHABLE
    elif isinstance(error, PyMongoError):
        echo_error(f"the database does not answer: {masked(str(error))[:200]}\nSee CORE4_MONGO_URL.")
    else:
        return None
    return UNREACHABLE


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="core4-jobs", prog_name="core4")
@click.option("--config", type=click.Path(dir_okay=False), help="TOML file with settings (CORE4_CONFIG).")
@click.pass_context
def core4(context: click.Context, config: str | None) -> None:
    """Enqueue jobs, watch them live, kill them, restart them, never lose one.

    First steps:

    \b
      core4 up                    start everything, keep it running until Ctrl-C
      core4 job list              what can be enqueued
      core4 job enqueue NAME --follow

    Exit codes: 0 fine or job complete, 1 job error, 2 bad usage or refused, 3 job killed,
    4 job inactive, 5 no result yet, 69 API not reachable, 130 Ctrl-C.
    """
    context.obj = config


for each in (
    init,
    run,
    job,
    schedule,
    worker,
    workers,
    tmux,
    pause,
    resume,
    controls,
    halt,
    doctor,
    events,
    counts,
    returns,
    function,
):
    core4.add_command(each)
job.add_command(workers)


@core4.command()
@jobs_options
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 5001]")
@click.option("--home", type=click.Path(file_okay=False), help="Data folder of the embedded database.")
@click.option("--no-examples", is_flag=True, help="Do not serve DummyJob and AccessLogReport.")
def up(files: tuple[str, ...], modules: tuple[str, ...], no_examples: bool, **overrides: Any) -> int:
    """Start database, API and worker, and keep them running until Ctrl-C.

    Without CORE4_MONGO_URL a private database is started in the data folder.

    \b
    Examples:
      core4 up
      core4 up my_jobs.py --reload
      core4 up -m my.package --port 8080
    """
    settings = load_settings(jobs=files + modules, **overrides)
    from core4.service import setup_logging
    from core4.stack import Interrupted, Stack, interruptible

    setup_logging(settings.log_level, settings.log_format)
    stack = Stack(settings, say=_say, examples=not no_examples)
    with interruptible():
        try:
            stack.start()
            _welcome(stack)
            stack.watch()
        except Interrupted:
            return _stop(stack)
        finally:
            stack.kill()
    return 0


def _say(line: str) -> None:
    click.echo(line, err=True)


def _welcome(stack: Stack) -> None:
    _say(f"api       {stack.url}")
    if stack.settings.home != load_settings().home:
        _say("commands  of other terminals find it after:")
        _say(f"          export CORE4_HOME={shlex.quote(str(stack.settings.home))}")
    if stack.default_user:
        _say("user      admin, password hans")
        _say("WARNING   these are default credentials, for this machine only: core4 user passwd admin")
    _say(
        f"ready     {stack.url}\n\n"
        "Try in another terminal:\n"
        "  core4 job list\n"
        "  core4 job enqueue core4.queue.helper.job.example.DummyJob sleep=10 --follow\n"
        "  core4 init my_jobs.py\n"
        "Ctrl-C stops everything."
    )


def _stop(stack: Stack) -> int:
    from core4.stack import Interrupted

    _say(f"\nstopping; running jobs get {stack.settings.drain:g} s to end (Ctrl-C again: at once)")
    try:
        stack.stop()
    except Interrupted:
        stack.kill()
        return DETACHED
    _say("stopped")
    return 0


@core4.command()
@click.option("--pace", type=float, default=8.0, show_default=True, help="Seconds that the job takes.")
def demo(pace: float) -> int:
    """Start everything in a temporary folder, run a real job over HTTP, show its result, and stop.

    \b
    Example:
      core4 demo
    """
    from core4.demo import run

    return run(load_settings(), pace)


@core4.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: 5001]")
def api(**overrides: Any) -> None:
    """Run the API alone, in the foreground, on the database of CORE4_MONGO_URL.

    \b
    Example:
      CORE4_MONGO_URL=mongodb://db1/?replicaSet=rs0 core4 api --port 5001
    """
    import asyncio

    from core4 import api as side
    from core4.embedded import database_url
    from core4.stack import refuse_default_user

    settings = load_settings(**overrides)
    _log_of(settings)
    with database_url(settings) as url:
        settings = replace(settings, mongo_url=url)
        asyncio.run(refuse_default_user(settings))
        side.main(settings)


def _log_of(settings: Settings) -> None:
    from core4.service import setup_logging

    setup_logging(settings.log_level, settings.log_format)


@core4.command()
@JSON_OPTION
def config(output: str) -> None:
    """Show every setting, its value and where that came from. Secrets are masked.

    \b
    Examples:
      core4 config
      core4 --config core4.toml config -o json
    """
    from core4.config import FIELDS

    settings = load_settings()
    rows = [
        {
            "setting": setting.variable,
            "value": settings.shown(name),
            "origin": settings.origins[name],
            "unit": setting.unit,
        }
        for name, setting in FIELDS.items()
    ]
    show_rows(rows, ["setting", "value", "unit", "origin"], output)


@core4.group()
def user() -> None:
    """Who may sign in, and what they may do. Talks to the database, not to the API.

    \b
    Examples:
      core4 user add alice --allow cop
      core4 user add carol --allow 'job://reports\\..*/x'
    """


def _with_users(action: Callable[[UserStore], Awaitable[T]], name: str | None = None, **data: Any) -> T:
    """Act on the users; what changes them has a `name` and gets its line in the audit."""
    import asyncio

    from core4.database import Database
    from core4.embedded import database_url
    from core4.events import EventStore
    from core4.users import UserStore

    settings = load_settings()

    async def act(url: str) -> T:
        database = await Database.connect(url, settings.mongo_database)
        users, events = UserStore(database, settings), EventStore(database)
        try:
            await users.prepare()
            if name is None:
                return await action(users)
            await events.prepare()
            async with events.action(name, _operator(), **data):
                return await action(users)
        finally:
            users.close()
            await database.close()

    with database_url(settings, start=True) as url:
        return asyncio.run(act(url))


def _operator() -> str:
    """Who sits at this machine, as far as it knows: these commands need no sign-in."""
    import getpass
    import socket

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _new_password(name: str) -> str:
    found = _given_password(name)
    if len(found) < SHORT_PASSWORD:
        click.echo(
            f"Warning: {len(found)} characters are guessed soon; take {SHORT_PASSWORD} or more", err=True
        )
    return found


def _given_password(name: str) -> str:
    given = os.environ.get("CORE4_NEW_PASSWORD")
    if given:
        return given
    if sys.stdin.isatty():
        password: str = click.prompt(
            f"Password for {name}", hide_input=True, confirmation_prompt=True, err=True
        )
        return password
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise click.UsageError("no password: type it at the prompt, pipe it in, or set CORE4_NEW_PASSWORD")
    return line


@user.command("add")
@click.argument("name")
@click.option(
    "--allow",
    "rights",
    multiple=True,
    metavar="RIGHT",
    help="cop (everything), job://PATTERN/x (run), job://PATTERN/r (read), code (ship source); repeatable.",
)
def user_add(name: str, rights: tuple[str, ...]) -> None:
    """Create a user; the password is asked for, piped in, or taken from CORE4_NEW_PASSWORD.

    \b
    Examples:
      core4 user add alice --allow cop
      pass show core4/carol | core4 user add carol --allow 'job://my_jobs\\..*/x'
    """
    password = _new_password(name)
    _with_users(
        lambda users: users.add(name, password, list(rights)), "user.add", user=name, rights=list(rights)
    )
    click.echo(
        f"user {name} is created" + ("" if rights else "; without --allow it may sign in, but see no job")
    )


@user.command("list")
@JSON_OPTION
def user_list(output: str) -> None:
    """List the users and their rights.

    \b
    Example:
      core4 user list -o json
    """
    rows = [
        {"name": each.name, "active": each.is_active, "rights": list(each.rights)}
        for each in _with_users(lambda users: users.list())
    ]
    show_rows(rows, ["name", "active", "rights"], output)


@user.command("rights")
@click.argument("name")
@click.option(
    "--allow",
    "rights",
    multiple=True,
    metavar="RIGHT",
    help="As for `user add`; repeatable. Without any the user may see no job.",
)
def user_rights(name: str, rights: tuple[str, ...]) -> None:
    """Give a user these rights instead of those before; none without any. Tokens have to be asked for anew.

    \b
    Example:
      core4 user rights carol --allow 'job://reports\\..*/x' --allow 'job://.*/r'
    """
    _with_users(
        lambda users: users.set_rights(name, list(rights)), "user.rights", user=name, rights=list(rights)
    )
    click.echo(f"{name} has " + (", ".join(rights) if rights else "no rights"))


@user.command("passwd")
@click.argument("name")
def user_passwd(name: str) -> None:
    """Change a password.

    \b
    Example:
      core4 user passwd admin
    """
    password = _new_password(name)
    _with_users(lambda users: users.set_password(name, password), "user.passwd", user=name)
    click.echo(f"the password of {name} is changed")


@user.command("enable")
@click.argument("name")
def user_enable(name: str) -> None:
    """Let a user who was disabled sign in again.

    \b
    Example:
      core4 user enable carol
    """
    _with_users(lambda users: users.disable(name, active=True), "user.enable", user=name)
    click.echo(f"{name} can sign in")


@user.command("disable")
@click.argument("name")
def user_disable(name: str) -> None:
    """Take away the right to sign in.

    \b
    Example:
      core4 user disable carol
    """
    _with_users(lambda users: users.disable(name), "user.disable", user=name)
    click.echo(f"{name} can no longer sign in")
