"""The plugin that says which rows of the acceptance list a run has covered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tests.rows import covered, table

MODULE = """
import pytest

@pytest.mark.row("S1", "S2")
def test_passes():
    pass

@pytest.mark.row("S2")
def test_second():
    assert {second}

@pytest.mark.row("S3")
def test_third():
    {third}
"""


def run(
    folder: Path, *more: str, second: str = "True", third: str = "pass"
) -> tuple[int, str, dict[str, dict[str, str]]]:
    """Exit code, output and report of a pytest session of its own."""
    (folder / "test_it.py").write_text(MODULE.format(second=second, third=third))
    ini = folder / "pytest.ini"
    ini.write_text("[pytest]\n")
    report = folder / "reports" / "rows.json"
    # Of the plugins that are installed it takes no more than it needs: others take seconds to load.
    command = ["-m", "pytest", "-q", "-p", "tests.rows", "-p", "xdist", "-c", str(ini)]
    done = subprocess.run(
        [sys.executable, *command, *more, f"--rows-report={report}", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(report.read_text()) if report.exists() else {},
    )


def test_passed_rows_are_covered(tmp_path: Path) -> None:
    """A row counts if every test that names it ran and passed."""
    code, output, report = run(tmp_path)

    assert code == 0, output
    assert covered(report) == {"S1", "S2", "S3"}


def test_rows_of_several_processes(tmp_path: Path) -> None:
    """The same when the tests are spread over processes, and a skip fails the session there, too."""
    code, output, report = run(tmp_path, "-n2", third='pytest.skip("no service")')

    assert code == 1
    assert "test_third: skipped" in output
    assert covered(report) == {"S1", "S2"}


def test_a_failed_test_uncovers_its_rows(tmp_path: Path) -> None:
    """One failed test of a row is enough."""
    code, _, report = run(tmp_path, second="False")

    assert code == 1
    assert covered(report) == {"S1", "S3"}


def test_a_skip_fails_the_session(tmp_path: Path) -> None:
    """A row whose test was skipped would look covered by a test that says nothing."""
    code, output, report = run(tmp_path, third='pytest.skip("no service")')

    assert code == 1
    assert "test_third: skipped" in output
    assert "S3" not in covered(report)


def test_an_expected_failure_fails_the_session(tmp_path: Path) -> None:
    """The same for a test that is expected to fail."""
    code, output, _ = run(tmp_path, third='pytest.xfail("later")')

    assert code == 1
    assert "test_third: expected to fail" in output


def test_an_unknown_row_is_an_error(tmp_path: Path) -> None:
    """A misspelt row is refused before anything runs."""
    (tmp_path / "conftest.py").write_text("")
    code, output, _ = run(tmp_path, third='pass\n\n@pytest.mark.row("S999")\ndef test_fourth():\n    pass')

    assert code != 0
    assert "no such row: S999" in output


def test_table_names_what_is_missing() -> None:
    """The table has a line for what is covered, missing and failed."""
    text = table({"S1": {"a": "passed"}, "S2": {"a": "passed", "b": "failed"}})

    assert "S  1 of 53 rows covered" in text
    assert "covered: S1\n" in text
    assert "failed:  S2  b failed" in text
    assert "S3 S4" in text
