"""Schedules as a user has them: two workers, one killed; an operator's change; the command line."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4.client import ApiError, Client
from core4.cron import fires_between
from core4.schedules import fire_id
from tests.acceptance.test_cli import Cli
from tests.acceptance.test_up import child
from tests.helpers import ADMIN, FAST, ROOT, Command, Stack, eventually, program, running_stack

JOBS = ROOT / "tests/jobs/ticking.py"
TICKING, YEARLY, NAMED = "tests.jobs.Ticking", "tests.jobs.Yearly", "reports/yearly"
DUMMY = "core4.queue.helper.job.example.DummyJob"


def shown(stack: Stack, name: str = TICKING) -> dict[str, Any]:
    schedule: dict[str, Any] = stack.data("GET", f"/schedule/{name}")
    return schedule


def fired(stack: Stack, at_least: int) -> bool:
    count = shown(stack)["fired"]
    assert count >= at_least, f"{count} fired"
    return True


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def made(stack: Stack) -> list[ObjectId]:
    """The ids of all jobs of the ticking schedule, which have all ended well."""
    query = {"filter": {"qual_name": TICKING}, "per_page": 500}
    assert stack.data("GET", "/job/queue", json=query) == []
    rows = stack.data("GET", "/job/journal", json=query)
    assert {row["state"] for row in rows} == {"complete"}
    return [ObjectId(row["_id"]) for row in rows]


@pytest.mark.row("S49")
@pytest.mark.row("F44")
def test_two_workers_make_one_job_per_instant(tmp_path: Path) -> None:
    """Also while one of them is killed and comes back; compared with the instants worked out offline."""
    with (
        running_stack(tmp_path, JOBS) as stack,
        Command([program("core4"), "worker", JOBS, "--name", "second"], second_environ(tmp_path)) as second,
    ):
        second.wait_for("ready")
        since = time_of(shown(stack)["since"])
        eventually(lambda: fired(stack, 3), 60, what="three instants")
        child(stack, "-m core4 worker").kill()
        eventually(lambda: fired(stack, 8), 60, what="five more, by the other worker")
        stack.command.wait_for("started again")
        eventually(lambda: fired(stack, 12), 60, what="and more, by both")
        stack.data("PUT", f"/schedule/pause/{TICKING}")
        paused = shown(stack)
        last = time_of(paused["last_fired"]["at"])
        instants = fires_between("* * * * * *", since, last)
        jobs = eventually(lambda: made(stack), 60, what="all have ended")

    # What was made in the moment of the pause is later and was not counted.
    assert sorted(job for job in jobs if job.generation_time <= last) == sorted(
        fire_id(TICKING, instant) for instant in instants
    )
    assert len(jobs) == len(set(jobs))
    assert (paused["fired"], paused["skipped"]) == (len(instants), 0)
    assert len(instants) >= 12


def second_environ(home: Path) -> dict[str, str]:
    return {"CORE4_HOME": str(home), **FAST}


@pytest.mark.row("S49")
def test_an_operators_change_outlives_a_restart(tmp_path: Path) -> None:
    """It stands over the code's word, which is published again, until it is reset."""
    with running_stack(tmp_path, JOBS) as stack:
        assert shown(stack)["source"] == "code"
        change = {"expression": "30 5 * * MON", "zone": "Europe/Berlin"}
        stack.data("PUT", f"/schedule/{TICKING}", json=change)
        stack.data(
            "PUT", "/schedule/mine", json={"qual_name": DUMMY, "expression": "@daily", "enabled": False}
        )
    with running_stack(tmp_path, JOBS) as stack:
        found = shown(stack)
        assert (found["expression"], found["zone"]) == ("30 5 * * MON", "Europe/Berlin")
        assert found["code"]["expression"] == "* * * * * *"
        assert found["override"] == change
        assert shown(stack, "mine")["source"] == "operator"
        before = found["fired"]

        stack.data("PUT", f"/schedule/reset/{TICKING}")
        eventually(lambda: fired(stack, before + 2), 30, what="it fires as the code says")


def test_a_worker_that_is_no_scheduler(tmp_path: Path) -> None:
    """CORE4_SCHEDULER=false: schedules are published, and somebody else's business."""
    with running_stack(tmp_path, JOBS, CORE4_SCHEDULER="false") as stack:
        job_id = stack.data("PUT", f"/schedule/trigger/{TICKING}")
        stack.wait_for_state(job_id, "complete")
        with Command([program("core4"), "worker", JOBS], second_environ(tmp_path)) as other:
            other.wait_for("schedule.fired")
        assert "schedule.fired" not in stack.command.output


# ---------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack where only the command line makes something happen."""
    home = tmp_path_factory.mktemp("stack")
    with running_stack(home, JOBS, CORE4_SCHEDULER="false") as stack:
        yield stack


@pytest.fixture
def cli(quiet: Stack) -> Cli:
    return Cli(quiet)


def test_list_and_show(cli: Cli) -> None:
    rows = {row["_id"]: row for row in cli.json("schedule", "list")}
    assert set(rows) == {TICKING, NAMED}
    assert cli.json("schedule", "list", "year") == [rows[NAMED]]

    found = cli.json("schedule", "show", NAMED)
    assert found["qual_name"] == YEARLY
    assert (found["zone"], found["missed"], found["limit"]) == ("Europe/Berlin", "all", 3)
    text = cli("schedule", "list") + cli("schedule", "show", NAMED)
    assert "-01-01 06:00:00 CET" in text
    assert "code says" in text


def test_the_catalogue_shows_the_schedule(quiet: Stack) -> None:
    rows = {row["_id"]: row["schedule"] for row in quiet.data("GET", "/job/list")}
    assert rows[TICKING] == "* * * * * *"
    assert rows[YEARLY]["zone"] == "Europe/Berlin"


def test_next(cli: Cli) -> None:
    """Of a stored schedule, and of an expression that is only tried."""
    assert len(cli.json("schedule", "next", NAMED, "--count", "3")) == 3
    rows = cli.json("schedule", "next", "--cron", "0 6 * * *", "--zone", "Europe/Berlin", "--count", "2")
    assert [row["local"].split()[1] for row in rows] == ["06:00:00"] * 2
    assert "59/15" in cli("schedule", "next", "--cron", "59/15 * * * *", code=2)
    assert "--cron" in cli("schedule", "next", code=2)
    assert "--zone goes with --cron" in cli("schedule", "next", NAMED, "--zone", "UTC", code=2)


def test_the_life_of_a_schedule(cli: Cli, quiet: Stack) -> None:
    """Made, changed, paused, resumed, triggered and deleted."""
    words = ["--job", YEARLY, "--cron", "@hourly", "--args", "month=2026-02", "--option", "priority=7"]
    made = cli.json("schedule", "set", "mine", *words)
    assert (made["args"], made["options"], made["expression"]) == (
        {"month": "2026-02"},
        {"priority": 7},
        "0 * * * *",
    )
    assert "skip" in cli("schedule", "set", "mine", "--missed", "skip", "--max-age", "60")
    assert cli.json("schedule", "set", "mine", "--disable")["state"] == "disabled"
    assert "does not fire" in cli("schedule", "next", "mine")
    assert cli.json("schedule", "set", "mine", "--enable")["state"] == "active"
    assert "mine is paused" in cli("schedule", "pause", "mine")
    assert "paused" in cli("schedule", "show", "mine")
    assert "mine is active" in cli("schedule", "resume", "mine")

    first = cli.json("schedule", "trigger", "mine", "--key", "k")["_id"]
    assert cli("schedule", "trigger", "mine", "--key", "k").strip() == first
    assert quiet.wait_for_state(first, "complete")["result"] == "2026-02"
    assert "complete" in cli("schedule", "trigger", "mine", "--follow")
    assert "mine is deleted" in cli("schedule", "delete", "mine")
    assert "no schedule [mine]" in cli("schedule", "show", "mine", code=2)


def test_reset(cli: Cli) -> None:
    cli("schedule", "set", NAMED, "--cron", "@monthly", "--limit", "9")
    kept = cli.json("schedule", "reset", NAMED, "expression")
    assert (kept["expression"], kept["limit"]) == ("0 6 1 1 *", 9)
    assert cli.json("schedule", "reset", NAMED)["override"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["set", "mine", "--cron", "@daily"], "needs its qual_name"),
        (["set", "mine", "--job", YEARLY, "--cron", "@daily"], "month"),
        (["set", "mine", "--job", YEARLY, "--cron", "61 * * * *"], "61 is not from 0 to 59"),
        (["set", "mine", "--job", YEARLY, "--cron", "@daily", "--zone", "Berlin"], "not a time zone"),
        (["set", "mine", "--job", "no.such.Job", "--cron", "@daily"], "unknown job"),
        (["set", NAMED, "--missed", "some"], "'some'"),
        (["reset", NAMED, "colour"], "expected some of"),
        (["delete", NAMED], "comes from the code"),
        (["pause", "nothing"], "no schedule [nothing]"),
    ],
)
def test_refused(cli: Cli, words: list[str], message: str) -> None:
    output = cli("schedule", *words, code=2)
    assert message in output
    assert "Traceback" not in output


def test_client_library(quiet: Stack) -> None:
    """The same in Python; names are escaped."""
    with Client(quiet.url, auth=ADMIN) as client:
        client.set_schedule("my/own", qual_name=YEARLY, expression="@daily", args={"month": "x"})
        assert {row["_id"] for row in client.schedules(search="my")} == {"my/own"}
        assert client.pause_schedule("my/own")["state"] == "paused"
        assert client.resume_schedule("my/own")["state"] == "active"
        assert client.reset_schedule(NAMED)["override"] == {}
        assert len(client.schedule("my/own", count=3)["next"]) == 3
        assert len(client.next_fires("@daily", count=7)["next"]) == 7
        job_id = client.trigger_schedule("my/own", key="once")
        assert client.trigger_schedule("my/own", key="once") == job_id
        assert client.wait(job_id, timeout=60)["result"] == "x"
        client.delete_schedule("my/own")
        with pytest.raises(ApiError, match="no schedule") as refused:
            client.schedule("my/own")
    assert refused.value.status == 404
