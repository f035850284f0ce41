"""`core4 function ...` on a running API that takes functions: every verb, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from core4 import cli
from core4.actions import ACTION
from core4.callers import Functions
from core4.client import Client
from core4.config import Settings
from core4.database import Database
from core4.handles import Key
from core4.users import UserStore
from tests.integration.driver import Api
from tests.jobs import shipped

ANN, TIM = ("ann", "ann's password"), ("tim", "tim's password")
KEY = "ann:" + "k" * 40
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, functions=True)


@pytest.fixture
async def key(api: Api, users: UserStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is known of a function that Ann has sent; the command line is Ann's."""
    await users.add(*ANN, allow=["code", r"job://core4\.function\.addition/x"])
    await users.add(*TIM, allow=[r"job://core4\.function\.addition/r"])
    monkeypatch.setenv("CORE4_URL", api.root)
    monkeypatch.setenv("CORE4_USER", ANN[0])
    monkeypatch.setenv("CORE4_PASSWORD", ANN[1])

    def send() -> str:
        with Functions(Client(api.root, ANN), key=KEY) as functions:
            return functions.schedule(shipped.addition, a=1, b=2).action_id

    return await asyncio.to_thread(send)


async def core4(*words: str) -> int:
    return await asyncio.to_thread(cli.main, ["function", *words])


async def test_a_key_is_made(capsys: Captured) -> None:
    """What it prints is what both sides accept; each time another one."""
    for _ in range(2):
        assert await core4("key", "ann.1") == 0
    first, second = capsys.readouterr().out.splitlines()

    assert first != second
    parsed = Key.parse(first)
    assert parsed.name == "ann.1"
    assert Settings.load(environ={}, function_keys=(first,)).signers() == {"ann.1": parsed.secret}


async def test_what_was_sent_is_listed_shown_and_revoked(key: str, capsys: Captured) -> None:
    assert await core4("list") == 0
    table = capsys.readouterr().out
    assert await core4("list", "-o", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert await core4("show", key) == 0
    shown = capsys.readouterr().out
    assert await core4("show", key, "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)

    assert "addition" in table
    assert (row["key"], row["methodname"], row["created_by"], row["revoked"]) == (
        key,
        "addition",
        "ann",
        None,
    )
    assert "code" not in row
    assert shown == f"{key}  signed by ann with key ann\n{found['code']}"
    assert "def addition(a, b):" in found["code"]

    assert await core4("revoke", key, "--reason", "a test") == 0
    assert capsys.readouterr().out == "addition is revoked by ann\n"
    assert await core4("show", key) == 0
    assert "revoked by ann: a test" in capsys.readouterr().out
    assert await core4("list") == 0
    assert "by ann" in capsys.readouterr().out
    assert await core4("revoke", key) == 0, "again changes nothing"
    assert await core4("show", key) == 0
    assert "revoked by ann: a test" in capsys.readouterr().out


async def test_the_beginning_of_a_key_is_enough(
    key: str, api: Api, database: Database, capsys: Captured
) -> None:
    """If it is that of one."""
    assert await core4("show", key[:6].upper()) == 0
    assert capsys.readouterr().out.startswith(f"{key}  signed by ann")
    assert await core4("revoke", key[:10]) == 0
    assert capsys.readouterr().out == "addition is revoked by ann\n"

    document = await database.collection(ACTION).find_one({"_id": key})
    assert document is not None
    twin = key[:8] + ("0" if key[8] != "0" else "1") * 56
    await database.collection(ACTION).insert_one({**document, "_id": twin})
    assert await core4("show", key[:8]) == 2
    assert f"2 keys begin with {key[:8]}" in capsys.readouterr().err
    assert await core4("show", key[:9]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["key"], "Missing argument 'NAME'"),
        (["key", "no name"], "a key's name has 1 to 50"),
        (["key", "x" * 51], "a key's name has 1 to 50"),
        (["list", "all"], "unexpected extra argument"),
        (["list", "-o", "yaml"], "'yaml' is not one of"),
        (["show"], "Missing argument 'KEY'"),
        (["show", "0" * 64], "not found; `core4 function list` shows the keys"),
        (["show", "../user"], "not found"),
        (["show", "0" * 6], "function [000000] not found; `core4 function list` shows the keys"),
        (["show", "0" * 5], "of a key 6 digits are needed"),
        (["revoke"], "Missing argument 'KEY'"),
        (["revoke", "0" * 64], "not found"),
        (["revoke", "0" * 64, "--why", "x"], "No such option"),
        (["run"], "No such command 'run'"),
    ],
    ids=" ".join,
)
async def test_bad_input_is_exit_code_2(key: str, words: list[str], message: str, capsys: Captured) -> None:
    assert await core4(*words) == 2
    assert message in capsys.readouterr().err


async def test_who_may_only_read_revokes_nothing(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("CORE4_USER", TIM[0])
    monkeypatch.setenv("CORE4_PASSWORD", TIM[1])

    assert await core4("show", key) == 0
    assert await core4("revoke", key) == 2
    assert "no right to execute job [core4.function.addition]" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", "key", "list", "show", "revoke"])
async def test_each_verb_has_an_example(verb: str, capsys: Captured) -> None:
    assert await core4(*verb.split(), "--help") == 0
    assert f"core4 function {verb}".strip() in capsys.readouterr().out.partition("Example")[2]
