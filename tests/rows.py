"""pytest plugin: which rows of the acceptance list a run has covered.

A test names what it shows by ``@pytest.mark.row("S12", "S13")``. A row counts when every test that names
it ran and passed. A marked test that is skipped or expected to fail fails the whole session: a row must
not look covered by a test that says nothing. ``--rows-report FILE`` writes what was found;
``python -m tests.rows FILE`` shows it as a table.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

# All rows there are: S job API and job classes, F tasks and pipelines, M plain functions. S54 was dropped.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "S": tuple(f"S{number}" for number in range(1, 54)),
    "F": tuple(f"F{number}" for number in range(1, 62)),
    "M": tuple(f"M{number}" for number in range(1, 44)),
}
KNOWN = frozenset(row for rows in FAMILIES.values() for row in rows)


ROW = "row"  # property of a test and its reports: they reach us from other processes, too


class Rows:
    """Collects the outcome of every marked test of this session."""

    def __init__(self) -> None:
        self.tests: dict[str, tuple[str, ...]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = tuple(str(value) for name, value in report.user_properties if name == ROW)
        if not rows:
            return
        self.tests[report.nodeid] = rows
        outcome = "expected to fail" if hasattr(report, "wasxfail") else report.outcome
        before = self.outcomes.get(report.nodeid, "passed")
        # Set-up, call and tear-down report one by one; the worst of them stands.
        self.outcomes[report.nodeid] = outcome if before == "passed" else before

    def hollow(self) -> list[str]:
        """The marked tests that did not really run."""
        return [
            f"{nodeid}: {outcome}"
            for nodeid, outcome in self.outcomes.items()
            if outcome in {"skipped", "expected to fail"}
        ]

    def report(self) -> dict[str, dict[str, str]]:
        """For each row its tests and how they ended."""
        rows: dict[str, dict[str, str]] = defaultdict(dict)
        for nodeid, outcome in self.outcomes.items():
            for row in self.tests[nodeid]:
                rows[row][nodeid] = outcome
        return dict(rows)


ROWS = pytest.StashKey[Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows-report", metavar="FILE", help="write which rows the run covered, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name, ...): the rows of the acceptance list this test shows")
    rows = config.stash[ROWS] = Rows()
    config.pluginmanager.register(rows, "rows-of-this-session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        rows = [str(row) for marker in item.iter_markers("row") for row in marker.args]
        if unknown := set(rows) - KNOWN:
            raise pytest.UsageError(f"{item.nodeid}: no such row: {', '.join(sorted(unknown))}")
        item.user_properties.extend((ROW, row) for row in rows)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # one of several processes: whoever started it hears of all tests
    rows = session.config.stash[ROWS]
    if path := session.config.getoption("--rows-report"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rows.report(), indent=1, sort_keys=True) + "\n")
    if rows.hollow():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    hollow = config.stash[ROWS].hollow()
    if hollow:
        terminalreporter.section("rows: these tests must run and pass", red=True, bold=True)
        for line in hollow:
            terminalreporter.write_line(line)


def covered(report: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The rows all of whose tests passed."""
    return {row for row, tests in report.items() if tests and set(tests.values()) == {"passed"}}


def table(report: Mapping[str, Mapping[str, str]]) -> str:
    """What is covered, what failed and what no test has shown, by family."""
    done = covered(report)
    lines = []
    for family, rows in FAMILIES.items():
        failed = [row for row in rows if row in report and row not in done]
        lines.append(f"{family}  {len(done & set(rows))} of {len(rows)} rows covered")
        lines.append("   covered: " + _words(row for row in rows if row in done))
        lines.append("   missing: " + _words(row for row in rows if row not in done and row not in failed))
        lines += [f"   failed:  {row}  {_why(report[row])}" for row in failed]
    return "\n".join(lines)


def _words(rows: Iterable[str]) -> str:
    text = " ".join(rows) or "none"
    return textwrap.fill(text, width=100, subsequent_indent=" " * 12)


def _why(tests: Mapping[str, str]) -> str:
    return "; ".join(f"{nodeid} {outcome}" for nodeid, outcome in tests.items() if outcome != "passed")


def main(path: str) -> int:
    """Print the table of a report."""
    try:
        report = json.loads(Path(path).read_text())
    except FileNotFoundError:
        print(f"{path} is missing: run `make test` first", file=sys.stderr)
        return 1
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
