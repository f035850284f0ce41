"""Finding job classes in modules, packages and files, and every way in which that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core4 import errors
from core4.discovery import describe, load, locate, resolve

JOB = """
from core4 import CoreJob, CoreAbstractMixin

class Base(CoreJob, CoreAbstractMixin):
    author = "me"

class {name}(Base):
    "Says hello."
    author = "me"
    tag = ["greeting"]
    schedule = "0 6 * * *"
    attempts = 3

    def execute(self, name: str, times: int = 1):
        return "hello"
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of one test are not seen by the next."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_is_described(tmp_path: Path) -> None:
    file = write(tmp_path / "hello_file.py", JOB.format(name="Hello"))

    found = load([file])

    assert found.problems == []
    (entry,) = found.entries
    assert entry["_id"] == "hello_file.Hello"
    assert (entry["author"], entry["doc"], entry["tag"], entry["schedule"]) == (
        "me",
        "Says hello.",
        ["greeting"],
        "0 6 * * *",
    )
    assert entry["options"]["attempts"] == 3
    assert entry["schema"]["required"] == ["name"]
    assert (entry["file"], entry["target"], entry["module"], entry["qualname"]) == (
        file,
        file,
        "hello_file",
        "Hello",
    )
    assert getattr(locate(entry), "qual_name", None) == "hello_file.Hello"


def test_a_schedule_is_described_in_plain_json(tmp_path: Path) -> None:
    """With arguments that fit, or the class is refused; left out they may come from an operator."""
    schedule = """types.MappingProxyType({"expression": "@daily", "args": {"name": "Ada"}})"""
    text = "import types" + JOB.replace('"0 6 * * *"', schedule)
    good = write(tmp_path / "good_schedule.py", text.replace("{name}", "Good"))
    bad = write(tmp_path / "bad_schedule.py", text.replace("{name}", "Bad").replace('"Ada"', "5"))

    found = load([good, bad])

    (entry,) = found.entries
    assert entry["schedule"] == {"expression": "@daily", "args": {"name": "Ada"}}
    (problem,) = found.problems
    assert "bad_schedule.Bad: the args of its schedule do not fit execute: /name" in problem.error


def test_a_package_is_walked_and_a_broken_module_costs_only_itself(tmp_path: Path) -> None:
    write(tmp_path / "walked/__init__.py", "")
    write(tmp_path / "walked/__main__.py", "raise SystemExit('must not run')")
    write(tmp_path / "walked/one.py", JOB.format(name="One"))
    write(tmp_path / "walked/broken.py", "from core4 import CoreJob\n1 / 0\n")
    write(tmp_path / "walked/deep/__init__.py", "from walked.one import One")
    write(tmp_path / "walked/deep/two.py", JOB.format(name="Two"))

    found = load(["walked"])

    assert sorted(found.classes) == ["walked.deep.two.Two", "walked.one.One"]
    (problem,) = found.problems
    assert problem.target == "walked.broken"
    assert "1 / 0" in "".join(problem.traceback)
    assert "importlib" not in "".join(problem.traceback)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("syntax_error", "def x(:\n", "SyntaxError"),
        ("exits", "raise SystemExit(2)", "SystemExit"),
        (
            "no_author",
            "from core4 import CoreJob\nclass A(CoreJob):\n  def execute(self): pass\n",
            "names no author",
        ),
        ("bad_option", "from core4 import CoreJob\nclass A(CoreJob):\n  attempts = 0\n", "attempts is 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_problem(tmp_path: Path, name: str, text: str, words: str) -> None:
    found = load([write(tmp_path / f"{name}.py", text)])

    assert found.entries == []
    assert words in found.problems[0].error
    assert name not in sys.modules or name == "no_author"


def test_a_corrected_file_can_be_loaded(tmp_path: Path) -> None:
    file = write(tmp_path / "mended.py", "1 / 0")
    assert load([file]).problems

    write(Path(file), JOB.format(name="Mended") + "# longer\n")

    assert list(load([file]).classes) == ["mended.Mended"]


def test_a_file_may_not_take_the_name_of_a_loaded_module(tmp_path: Path) -> None:
    (problem,) = load([write(tmp_path / "logging.py", "")]).problems

    assert "the name logging is taken" in problem.error


def test_two_classes_of_one_name_are_both_named(tmp_path: Path) -> None:
    text = JOB.format(name="Same") + "    qual_name = 'shared.Same'\n"
    first, second = write(tmp_path / "first_same.py", text), write(tmp_path / "second_same.py", text)

    found = load([first, second])

    assert found.entries == []
    assert first in found.problems[0].error
    assert second in found.problems[0].error


def test_the_same_file_twice_is_one(tmp_path: Path) -> None:
    file = write(tmp_path / "twice.py", JOB.format(name="Twice"))

    found = load([file, file, "twice"])

    assert (len(found.entries), found.problems) == (1, [])


@pytest.mark.row("S30")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Nothing", errors.UnknownModule),
        ("not_there.Hello", errors.UnknownModule),
        ("named.sub.Hello", errors.UnknownModule),
        ("named.Missing", errors.UnknownName),
        ("named.VALUE", errors.NotAClass),
        ("named.function", errors.NotAClass),
        ("named.Plain", errors.NotAJob),
        ("named.Base", errors.AbstractJob),
        ("named.Nobody", errors.MissingAuthor),
        ("broken_named.Hello", errors.JobInvalid),
    ],
)
def test_every_failure_of_resolve_is_distinct(
    tmp_path: Path, name: str, error: type[errors.Core4Error]
) -> None:
    more = (
        "VALUE = 1\ndef function(): ...\nclass Plain: ...\nclass Nobody(Base):\n    def execute(self): ...\n"
    )
    write(tmp_path / "named.py", JOB.format(name="Hello") + more)
    write(tmp_path / "broken_named.py", "import nothing_like_this\n")

    with pytest.raises(errors.Core4Error) as caught:
        resolve(name)

    assert type(caught.value) is error


@pytest.mark.row("S30")
def test_resolve_by_module_and_by_published_name(tmp_path: Path) -> None:
    write(tmp_path / "found_here.py", JOB.format(name="Hello") + "    qual_name = 'other.name.Hello'\n")

    by_path = resolve("found_here.Hello")
    by_name = resolve("other.name.Hello", ["found_here"])

    assert by_path is by_name
    assert describe(by_path)["_id"] == "other.name.Hello"
