"""Rights: what their texts mean, and what is refused."""

from __future__ import annotations

import pytest

from core4.errors import BadRequest
from core4.permissions import Rights, check

NAME = "core4.queue.helper.job.example.DummyJob"


@pytest.mark.parametrize(
    ("right", "name", "execute", "read"),
    [
        pytest.param("cop", "anything", True, True, id="cop-may-all"),
        pytest.param(f"job://{NAME}/x", NAME, True, True, id="x-implies-r"),
        pytest.param(f"job://{NAME}/r", NAME, False, True, id="r-only-reads"),
        pytest.param(r"job://core4\.queue\..*/x", NAME, True, True, id="pattern"),
        pytest.param("job://core4.queue/x", NAME, False, False, id="no-match-at-the-start-only"),
        pytest.param("job://DummyJob/x", NAME, False, False, id="no-match-at-the-end-only"),
        pytest.param("job://a.b/x", "a.b.c", False, False, id="longer-name"),
        pytest.param("job://a|b/r", "a.evil", False, False, id="alternatives-are-anchored"),
        pytest.param(r"job://a\.b\n?/r", "a.b\n", False, True, id="newline-only-if-written"),
        pytest.param("job://a.b$/r", "a.b\n", False, False, id="dollar-does-not-let-a-newline-in"),
        pytest.param("job://[ab]{1,3}/x", "abab", False, False, id="counted"),
        pytest.param("job://.*/x", "a" * 201, False, False, id="names-have-200-characters"),
    ],
)
def test_rights(right: str, name: str, execute: bool, read: bool) -> None:
    """A pattern holds for the whole name or not at all."""
    rights = Rights.of([right])

    assert rights.may_execute(name) is execute
    assert rights.may_read(name) is read


def test_rights_add_up() -> None:
    """Several rights give what each of them gives."""
    rights = Rights.of(["job://a/x", "job://b/r"])

    assert [rights.may_execute(name) for name in "abc"] == [True, False, False]
    assert [rights.may_read(name) for name in "abc"] == [True, True, False]


def test_no_rights_is_nothing() -> None:
    """Who has no right may do nothing."""
    assert not Rights.of([]).may_read("a")


@pytest.mark.parametrize(
    ("right", "says"),
    [
        ("", "neither"),
        ("admin", "neither"),
        ("job://a", "neither"),
        ("job://a/w", "neither"),
        ("job:///x", "neither"),
        ("api://a/r", "neither"),
        ("job://(/x", "missing"),
        ("job://*/x", "nothing to repeat"),
        ("job://(a+)+b/x", "group must not be repeated"),
        ("job://(?:a|aa)*b/x", "group must not be repeated"),
        ("job://(a){2,}/x", "group must not be repeated"),
        ("job://a*a*a*a*b/x", "more than 3 repeats"),
        (r"job://(a)\1/x", "back references"),
        ("job://(?=a)a/x", "look-around"),
        ("job://(?i)a/x", "flags"),
        (f"job://{'a' * 201}/x", "longer than 200"),
        (f"job://{'a?' * 22}{'a' * 22}/x", "too many"),
        (f"job://{'(a|a)' * 22}/x", "too many"),
    ],
)
def test_what_is_not_a_right(right: str, says: str) -> None:
    """Whoever writes rights is told what is wrong with them."""
    with pytest.raises(BadRequest, match=says):
        check(right)


def test_some_choices_are_accepted() -> None:
    """As many as people write: twenty names, or a few groups of a few."""
    names = "|".join(f"reports{n}" for n in range(15))
    for pattern in (names, f"(?:{names})\\.daily", r"(a|b|c)\.(?:d|e)\..*", "https?\\..*?"):
        assert Rights.of([f"job://{pattern}/r"]).readable


def test_brackets_and_escapes_are_literals() -> None:
    """What looks like a repeat but is a character does not count."""
    rights = Rights.of([r"job://a\*\+\{[*+{()?]b\(\?/x"])

    assert rights.may_execute("a*+{+b(?")
