"""The jobs that ship with the product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core4.discovery import load, resolve
from core4.examples import AccessLogReport, DummyJob
from core4.states import State
from core4.testing import run_job
from tests.helpers import ROOT


def test_both_are_published_under_their_documented_names() -> None:
    found = load(["core4.examples"])

    assert not found.problems
    assert set(found.classes) == {"core4.queue.helper.job.example.DummyJob", "core4.examples.AccessLogReport"}
    assert resolve("core4.queue.helper.job.example.DummyJob") is DummyJob


def test_dummy_reports_progress_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_job(DummyJob, sleep=0.2, loop_time=0.05)

    assert outcome.state is State.COMPLETE
    assert outcome.messages[0] == "sleeping for 0.2 sec."
    assert outcome.progress[0][0] < 0.1
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_dummy_can_be_shortened_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE4_DUMMY_SLEEP_MAX", "0")

    assert run_job(DummyJob, sleep=3600).messages[0] == "sleeping for 0 sec."


def test_the_report_counts_every_line_of_the_shipped_log() -> None:
    outcome = run_job(AccessLogReport)

    report = outcome.result
    lines = (AccessLogReport.SHIPPED / "access.log").read_text().splitlines()
    assert outcome.state is State.COMPLETE
    assert report["requests"] + report["unreadable"] == len(lines)
    assert report["unreadable"] > 0
    assert sum(report["by_status"].values()) == sum(report["by_hour"].values()) == report["requests"]
    assert report["by_status"]["504"] == sum('" 504 ' in line for line in lines)
    assert report["slowest"][0]["path"] == "/reports/monthly"
    assert len(report["slowest"]) == 10
    assert list(report["by_hour"]) == sorted(report["by_hour"])


def test_the_report_reads_a_file_below_a_root_of_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '192.0.2.1 - - [01/Jan/2025:10:00:00 +0000] "GET /a?b=c HTTP/1.1" 200 12 "-" "x" 0.5\n'
    (tmp_path / "own.log").write_text(line * 3 + "rubbish\n")
    monkeypatch.setenv("CORE4_DATA_ROOTS", str(tmp_path))

    report = run_job(AccessLogReport, path=str(tmp_path / "own.log")).result

    assert report["by_hour"] == {"10": 3}
    assert report["slowest"] == [{"path": "/a", "count": 3, "mean": 0.5, "longest": 0.5}]
    assert report["unreadable"] == 1


@pytest.mark.parametrize("path", ["/etc/passwd", "../examples.py", "link.log", "missing.log", "."])
def test_the_report_reads_nothing_else(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link.log").symlink_to("/etc/passwd")
    monkeypatch.setenv("CORE4_DATA_ROOTS", str(tmp_path))

    outcome = run_job(AccessLogReport, path=path)

    assert outcome.state is State.ERROR
    assert "no file that this job may read" in (outcome.error or "")


def test_the_shipped_log_is_what_its_script_makes() -> None:
    script = ROOT / "core/data/make_access_log.py"  # the script itself is not shipped
    made = subprocess.run(
        [sys.executable, script], capture_output=True, check=True, env={**os.environ}
    ).stdout

    assert made == (AccessLogReport.SHIPPED / "access.log").read_bytes()
