"""`core4 job ...`: the API's verbs for people and scripts, through the client library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from core4.commands_batch import batch
from core4.commands_bulk import STATES, act, conditions, meant, selecting
from core4.console import (
    JSON_OPTION,
    USAGE,
    arguments,
    connect,
    echo_error,
    echo_json,
    moment,
    parse_time,
    printable,
    show_rows,
)
from core4.display import OUTCOMES, line_text, watch

if TYPE_CHECKING:
    from core4.client import Client, Page

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
MOST_ROWS = 500  # of one page of the API
LONG_POLL = 30.0  # seconds that one request waits for a result
NO_RESULT = 5  # exit code: the job has not ended yet

QUEUE_COLUMNS = [
    "_id",
    "state",
    "flags",
    "progress",
    "priority",
    "attempt",
    "user",
    "enqueued",
    "runtime",
    "worker",
    "qual_name",
]


@click.group()
def job() -> None:
    """Enqueue jobs, watch and control them.

    \b
    Where the API is: CORE4_URL, else the `core4 up` of this machine, else http://localhost:5001.
    Who you are:      CORE4_USER and CORE4_PASSWORD, or CORE4_TOKEN.

    \b
    Examples:
      core4 job list
      core4 job enqueue DEFAULT:extract url=http://stats --follow
      core4 job queue --state running
    """


@job.command("list")
@click.argument("search", required=False)
@JSON_OPTION
def list_(search: str | None, output: str) -> None:
    """List what can be enqueued; SEARCH is a part of the name, with ? and *.

    \b
    Examples:
      core4 job list
      core4 job list report
    """
    with connect() as client:
        rows = _all(lambda page: client.catalogue(search=search, page=page, per_page=MOST_ROWS))
    if output == "table":
        rows = [{**row, "doc": (row.get("doc") or "").strip().partition("\n")[0]} for row in rows]
    show_rows(rows, ["_id", "author", "tag", "schedule", "doc"], output)


@job.command()
@click.argument("name")
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-f", "--follow", "attach", is_flag=True, help="Follow the job to its end.")
@click.option("--namespace", help="Namespace of the workers that serve it.")
@click.option("--priority", type=int, help="Higher runs first.")
@click.option("--attempts", type=int, help="Executions before it ends as error.")
@click.option("--worker", help="Only on this worker, as worker@host.")
@click.option("--force", is_flag=True, default=None, help="Ahead of everything else.")
@click.option("--key", help="The same key again, within a day, makes no second job.")
@click.option(
    "--dependency", "dependencies", multiple=True, help="Id of a job that has to complete first; repeatable."
)
@click.option(
    "--return-queue", "return_queues", multiple=True, help="Put its end into this queue; repeatable."
)
@JSON_OPTION
def enqueue(name: str, args: tuple[str, ...], attach: bool, output: str, **options: Any) -> int:
    """Put the job NAME into the queue and print its id.

    A value is read as JSON, else as text; instead of KEY=VALUE one JSON object may be given. More options
    of a job, like timeout, are set by their names among the arguments, if the job has no such argument.

    \b
    Examples:
      core4 job enqueue core4.queue.helper.job.example.DummyJob sleep=10 --follow
      core4 job enqueue my_jobs.Report month=2026-01 top=10 --priority 5
      core4 job enqueue my_jobs.Report '{"month": "2026-01"}'
    """
    given = {option: value for option, value in options.items() if value not in (None, ())}
    with connect() as client:
        job_id = client.enqueue(name, arguments(args), **given)
        return _started(client, job_id, attach, output)


def _listing(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a list of jobs: which ones, and which page."""
    for option in reversed(
        (
            click.option(
                "--state",
                "states",
                multiple=True,
                type=click.Choice(STATES),
                help="Only these states; repeatable.",
            ),
            click.option("--search", help="Part of the job's name, with ? and *."),
            click.option(
                "--filter", "where", help='More conditions as JSON, like {"args.month": "2026-01"}.'
            ),
            click.option("--page", type=int, default=0, show_default=True, help="Page; -1 is the last one."),
            click.option("--per-page", type=click.IntRange(1, MOST_ROWS), default=50, show_default=True),
            click.option("--cursor", help="Instead of --page: what the last line of the list before says."),
            JSON_OPTION,
        )
    ):
        command = option(command)
    return command


@job.command()
@_listing
def queue(output: str, **query: Any) -> None:
    """List the jobs in the queue.

    \b
    Flags: Z silent for zombie_time, K kill asked for, R removed, N longer than wall_time.
    Attempt: which of how many; F behind a priority: with force.

    \b
    Examples:
      core4 job queue
      core4 job queue --state error --state killed -o json
    """
    with connect() as client:
        page = client.queue(**_query(query, sort=[["_id", 1]]))
        counts = client.count() if output == "table" else {}
    words = ", ".join(f"{counts[state]} {state}" for state in STATES if counts.get(state))
    _show_jobs(page.rows, output, f"{_counted(page)}; in the queue: {words or 'nothing'}{_more(page)}")


@job.command()
@_listing
def history(output: str, **query: Any) -> None:
    """List finished and removed jobs, the last ones first.

    \b
    Examples:
      core4 job history
      core4 job history --state error --search report
    """
    with connect() as client:
        page = client.journal(**_query(query, sort=[["_id", -1]]))
    _show_jobs(page.rows, output, f"{_counted(page)}{_more(page)}")


@job.command()
@click.argument("job_id")
@JSON_OPTION
def show(job_id: str, output: str) -> None:
    """Show a job: its state, and why it still waits.

    \b
    Example:
      core4 job show 6720f1c0a1b2c3d4e5f60718
    """
    with connect() as client:
        found = client.show(job_id)
        waiting = found.get("highstate") == "waiting" and not found.get("journal")
        reasons = why_waiting(found, client.workers(), datetime.now(UTC)) if waiting else []
    if output == "json":
        echo_json({**found, "waiting": reasons})
        return
    rows = [{"field": name, "value": value} for name, value in _details(found).items()]
    rows += [{"field": "waits", "value": reason} for reason in reasons]
    show_rows(rows, ["field", "value"], output)


@job.command()
@click.argument("job_id")
@click.option("--level", type=click.Choice(list(LEVELS), case_sensitive=False), help="Least level.")
@click.option("--tail", type=click.IntRange(1), help="Only the last lines.")
@JSON_OPTION
def log(job_id: str, level: str | None, tail: int | None, output: str) -> None:
    """Print the lines that a job wrote.

    \b
    Examples:
      core4 job log 6720f1c0a1b2c3d4e5f60718 --tail 20
      core4 job log 6720f1c0a1b2c3d4e5f60718 --level WARNING -o json
    """
    where = {"levelno": {"gte": LEVELS[level.upper()]}} if level else None
    with connect() as client:
        fetch = partial(client.log, job_id, per_page=min(tail or MOST_ROWS, MOST_ROWS), filter=where)
        lines: Iterable[dict[str, Any]] = _behind_each_other(fetch)
        if tail:
            newest = _all(lambda page: fetch(page=page, sort=[["_id", -1]]), limit=tail)
            lines = reversed(newest)
        if output == "json":
            echo_json(list(lines))
            return
        for line in lines:
            click.echo(line_text(line))


@job.command()
@click.argument("job_id")
@click.option("--after", metavar="EVENT", help="Only what comes after this event's id.")
@JSON_OPTION
def follow(job_id: str, after: str | None, output: str) -> int:
    """Watch a job to its end; its outcome is the exit code. Ctrl-C detaches, the job goes on.

    With -o json every event is one line of JSON.

    \b
    Example:
      core4 job follow 6720f1c0a1b2c3d4e5f60718
    """
    with connect() as client:
        return watch(client, job_id, output, after)


@job.command()
@click.argument("id_", metavar="ID")
@click.option("--request", "by_request", is_flag=True, help="ID is that of the request that made the job.")
@click.option("--pull", is_flag=True, help="Remove the result: only one gets it.")
@click.option("--wait", is_flag=True, help="Wait until the job has ended, however long.")
@JSON_OPTION
def result(id_: str, by_request: bool, pull: bool, wait: bool, output: str) -> int:
    """Print a job's result as JSON.

    The exit code is the job's outcome, and 5 if it has not ended yet. With -o json all that is known of
    the result is printed, its status with it.

    \b
    Examples:
      core4 job result 6720f1c0a1b2c3d4e5f60718
      core4 job result 6720f1c0a1b2c3d4e5f60718 --wait --pull
    """
    which = {"request_id" if by_request else "job_id": id_}
    with connect() as client:
        ask = client.pull if pull else client.result
        found = ask(**which, timeout=LONG_POLL if wait else 0.0)
        while wait and found["status"] in ("Queued", "Running"):
            found = ask(**which, timeout=LONG_POLL)
    if output == "json":
        echo_json(found)
    elif found["status"] == "Completed":
        echo_json(found["result"])
    else:
        echo_error(f"{found['status']}: {(found['error'] or {}).get('message') or 'there is no result yet'}")
    if found["status"] == "Completed":
        return 0
    return OUTCOMES.get(found["error"]["state"], 1) if found["error"] else NO_RESULT


@job.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@click.option("--chain", is_flag=True, help="With all jobs that hang together with those that are named.")
@selecting
@JSON_OPTION
def kill(job_ids: tuple[str, ...], chain: bool, output: str, **picked: Any) -> int:
    """End jobs, whether they wait or run: those that are named, or all that match.

    \b
    Examples:
      core4 job kill 6720f1c0a1b2c3d4e5f60718
      core4 job kill 6720f1c0a1b2c3d4e5f60718 --chain
      core4 job kill --state pending --search report --dry-run
      core4 job kill --filter '{"args.month": "2026-01"}' --yes
    """
    if meant(picked, bool(job_ids)):
        if chain:
            raise click.UsageError("--chain goes with ids")
        return act("kill", output, **picked)
    if chain:
        return _each(job_ids, output, lambda client, job_id: client.kill_chain(job_id))
    return _each(job_ids, output, lambda client, job_id: [{"_id": job_id, **client.kill(job_id)}])


@job.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@selecting
@JSON_OPTION
def remove(job_ids: tuple[str, ...], output: str, **picked: Any) -> int:
    """Move jobs that do not run from the queue to the journal: those that are named, or all that match.

    \b
    Examples:
      core4 job remove 6720f1c0a1b2c3d4e5f60718
      core4 job remove --state error --filter '{"finished_at": {"lt": "2026-01-01"}}' --yes
    """
    if meant(picked, bool(job_ids)):
        return act("remove", output, **picked)
    return _each(job_ids, output, lambda client, job_id: [{"_id": job_id, **client.remove(job_id)}])


@job.command()
@click.argument("job_id", required=False)
@click.option("-f", "--follow", "attach", is_flag=True, help="Follow the new job to its end.")
@selecting
@click.option("--journal", is_flag=True, help="Those in the journal that match, not those in the queue.")
@JSON_OPTION
def restart(job_id: str | None, attach: bool, journal: bool, output: str, **picked: Any) -> int:
    """Run a job again and print the id of the new one, or all that match. What waits to be retried runs now.

    \b
    Examples:
      core4 job restart 6720f1c0a1b2c3d4e5f60718 --follow
      core4 job restart --state error --search report --dry-run
    """
    if meant(picked, job_id is not None):
        if attach:
            raise click.UsageError("--follow goes with one job")
        return act("restart", output, journal=journal, **picked)
    if journal:
        raise click.UsageError("--journal goes with --filter, --state, --search or --all")
    assert job_id is not None
    with connect() as client:
        return _started(client, client.restart(job_id), attach, output)


job.add_command(batch)


# ---------------------------------------------------------------------- inside


def _query(options: Mapping[str, Any], sort: Any) -> dict[str, Any]:
    query = dict(options)
    where = conditions(query.pop("where"), query.pop("states"))
    return {**query, "filter": where, "sort": sort}


def _counted(page: Page) -> str:
    return f"{len(page)} jobs here" if page.total is None else f"{page.total} jobs"


def _more(page: Page) -> str:
    return f"; go on with --cursor {page.next}" if page.next else ""


def _behind_each_other(fetch: Callable[..., Page]) -> Iterator[dict[str, Any]]:
    """The rows of all pages, each of which is read behind the one before it."""
    cursor: str | None = ""
    while cursor is not None:
        page = fetch(cursor=cursor)
        yield from page
        cursor = page.next


def _all(fetch: Callable[[int], Page], limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of all pages, or the first `limit` of them."""
    rows: list[dict[str, Any]] = []
    for number in itertools.count():
        page = fetch(number)
        rows += page.rows
        if number + 1 >= page.page_count or (limit is not None and len(rows) >= limit):
            return rows[:limit]
    raise AssertionError("unreachable")


def _started(client: Client, job_id: str, attach: bool, output: str) -> int:
    for warning in client.flash:
        click.echo(f"Warning: {printable(warning)}", err=True)
    if attach:
        return watch(client, job_id, output)
    if output == "json":
        echo_json({"_id": job_id})
    else:
        click.echo(job_id)
    return 0


def _each(
    job_ids: Sequence[str], output: str, act: Callable[[Client, str], Sequence[Mapping[str, Any]]]
) -> int:
    """Do the same to each job; what is refused does not keep the others from it. `act` tells of each job."""
    from core4.client import ApiError

    results: list[Mapping[str, Any]] = []
    code = 0
    with connect() as client:
        for job_id in job_ids:
            try:
                results += act(client, job_id)
            except ApiError as error:
                if error.status == 401 or error.status >= 500:
                    raise
                code = USAGE
                echo_error(f"{job_id}: {error.detail}")
    if output == "json":
        echo_json(results)
    else:
        for result in results:
            click.echo(f"{result['_id']} {result.get('state', '')}")
    return code


def _show_jobs(jobs: Sequence[Mapping[str, Any]], output: str, caption: str) -> None:
    rows = jobs if output == "json" else [{**each, **_summary(each)} for each in jobs]
    show_rows(rows, QUEUE_COLUMNS, output, caption)


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a job's row that are put together from several fields."""
    enqueued, progress = found.get("enqueued") or {}, found.get("prog") or {}
    return {
        "flags": "".join(name[0].upper() for name, is_set in (found.get("flag") or {}).items() if is_set),
        "progress": f"{float(progress.get('value') or 0):.0%}",
        "priority": f"{found.get('priority') or 0}{'F' if found.get('force') else ''}",
        "attempt": _attempt(found.get("trial") or 0, found.get("attempts") or 1),
        "user": enqueued.get("username"),
        "enqueued": moment(enqueued.get("at")),
    }


def _attempt(trial: int, attempts: int) -> str:
    """Which of how many; a restarted job goes on counting, but has all its attempts again."""
    return f"{trial}/{attempts}" if trial <= attempts else str(trial)


def _details(found: Mapping[str, Any]) -> dict[str, Any]:
    summary, error = _summary(found), found.get("last_error") or {}
    enqueued, holder = found.get("enqueued") or {}, found.get("locked") or {}
    details = {
        "job": found["_id"],
        "name": found["qual_name"],
        "state": found["state"] + (" (journal)" if found.get("journal") else ""),
        "args": found.get("args"),
        "namespace": found.get("namespace"),
        "progress": f"{summary['progress']} {(found.get('prog') or {}).get('message') or ''}",
        "attempt": summary["attempt"],
        "user": summary["user"],
        "enqueued": summary["enqueued"],
        "started": moment(found.get("started_at")),
        "finished": moment(found.get("finished_at")),
        "runtime": found.get("runtime"),
        "worker": holder.get("worker") or _last_worker(found),
        "only on": found.get("worker"),
        "flags": ", ".join(name for name, is_set in (found.get("flag") or {}).items() if is_set),
        "parent": enqueued.get("parent_id"),
        "chain": found.get("chain_id"),
        "restarted as": enqueued.get("child_id"),
        "result": found.get("result"),
        "error": error.get("exception"),
        "traceback": "".join(error.get("traceback") or []).rstrip() or None,
    }
    return {name: value for name, value in details.items() if value not in (None, "")}


def _last_worker(found: Mapping[str, Any]) -> str | None:
    """Who ran it last."""
    return next((line["worker"] for line in reversed(found.get("history") or ()) if line.get("worker")), None)


def why_waiting(found: Mapping[str, Any], workers: Sequence[Mapping[str, Any]], now: datetime) -> list[str]:
    """Why a waiting job does not run yet, as far as it can be seen from its document and the workers.

    Args:
        found: the job's document.
        workers: all worker documents.
        now: aware time to compare with.
    """
    up = [worker for worker in workers if worker.get("state") == "up"]
    if found.get("waits_for"):
        return [
            f"for {one['qual_name']} [{one['_id']}], which is {one['state']}" for one in found["waits_for"]
        ]
    if found.get("paused"):
        return [_paused(found["paused"])]
    if found.get("query_at") and parse_time(found["query_at"]) > now:
        left = (parse_time(found["query_at"]) - now).total_seconds()
        causes = {"failed": "its last attempt failed", "deferred": "it asked to be run later"}
        reasons = [entry["reason"] for entry in found.get("history") or () if entry.get("reason")]
        cause = causes.get(found["state"]) or (reasons[-1] if reasons else "it was given back")
        return [f"until {moment(found['query_at'])}, {left:.0f} s from now: {cause}"]
    if not up:
        return ["no worker is up: start one with `core4 worker` or `core4 up`"]
    pinned = found.get("worker")
    if pinned:
        up = [worker for worker in up if worker.get("name") == pinned]
        if not up:
            return [f"it may run on worker {pinned} only, which is not up"]
    held = found.get("held")
    if held == "max_running":
        key, limit = found.get("slot_key"), found.get("max_running")
        return [f"for a slot: at most {limit} of {key} run at the same time (max_running)"]
    if held == "rate_limit":
        return [
            f"until time has passed: {found['rate_limit']} of {found['qual_name']} are started (rate_limit)"
        ]
    if held and held != "worker":
        return [f"it is held: {held}"]
    return [_why_not_taken(found, up)]


def _paused(pause: Mapping[str, Any]) -> str:
    what = f"{pause['scope']} {pause['target']}".rstrip()
    why = f": {pause['reason']}" if pause.get("reason") else ""
    return f"{what} is paused by {pause['by']} since {moment(pause['at'])}{why}"


def _why_not_taken(found: Mapping[str, Any], up: Sequence[Mapping[str, Any]]) -> str:
    name, namespace = found["qual_name"], found.get("namespace") or "DEFAULT"
    serving = [worker for worker in up if name in (worker.get("jobs") or ())]
    if not serving:
        return f"no worker that is up runs {name}: start one with `core4 worker FILE`"
    serving = [worker for worker in serving if namespace in (worker.get("namespaces") or ())]
    if not serving:
        return f"no worker that runs {name} serves the namespace {namespace} (`core4 worker --namespace`)"
    if all((worker.get("running") or 0) >= (worker.get("slots") or 1) for worker in serving):
        return "all slots of the workers that run it are busy"
    if all(worker.get("gate") for worker in serving) and not found.get("force"):
        return f"the workers that run it start only jobs with force now ({serving[0]['gate']})"
    limit = found.get("max_parallel")
    return "for its turn" + (
        f"; at most {limit} of this name run on one worker (max_parallel)" if limit else ""
    )
