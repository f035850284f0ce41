"""The pages in a real browser, as people see them: nothing from elsewhere, no error, no broken policy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from core4.client import Client
from tests.helpers import ADMIN, Stack, running_stack

# Beside what tests need: Chromium does not look for updates or anything else outside.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 30_000  # milliseconds
JOBS = '''
from core4 import CoreJob

class Add(CoreJob):
    """Add two numbers.

    And say who wanted it.
    """
    author = "tests"
    def execute(self, left: int, right: int = 2, words: list[str] | None = None):
        return {"sum": left + right, "words": words}
'''


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for all tests of this file."""
    home = tmp_path_factory.mktemp("stack")
    (home / "page_jobs.py").write_text(JOBS)
    with running_stack(home, "page_jobs.py") as stack:
        yield stack


class Browser:
    """A browser of its own, and all that went wrong in it."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self._context, self._url = context, url
        self.complaints: list[str] = []
        self.asked: list[str] = []
        context.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)

    def open(self, path: str) -> Page:
        page = self._context.new_page()
        page.on("console", lambda told: self.complaints.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self._url + path)
        return page

    @property
    def elsewhere(self) -> list[str]:
        """What was asked for that is not ours."""
        return [url for url in self.asked if not url.startswith((self._url, "data:", "blob:"))]


@pytest.fixture
def browser(stack: Stack, tmp_path: Path) -> Iterator[Browser]:
    """Chromium with an empty profile, whose user knows the password if he is asked for it."""
    program = shutil.which("chromium")
    assert program, "Debian's chromium is missing; .ci/run installs it"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=program,
            args=FLAGS,
            http_credentials={"username": ADMIN[0], "password": ADMIN[1]},
        )
        yield Browser(context, stack.url)
        context.close()


def test_a_job_is_run_from_the_docs(browser: Browser, stack: Stack) -> None:
    """The page shows the job in its namespace's section; filled in and executed it runs."""
    page = browser.open("/docs")
    section = page.locator(".opblock-tag-section").filter(has=page.locator("#operations-tag-DEFAULT"))
    expect(section).to_contain_text("page_jobs.Add")
    operation = section.locator(".opblock").filter(has_text="page_jobs.Add")
    expect(operation).to_contain_text("Add two numbers.")
    operation.locator(".opblock-summary-control").click()
    expect(operation).to_contain_text("And say who wanted it.")
    row = operation.locator("tr[data-param-name=left]")
    row.locator("input").fill("40")
    operation.locator(".body-param textarea, .opblock-section-request-body textarea").first.fill(
        '{"words": ["a"]}'
    )
    operation.locator("button.execute").click()
    answer = operation.locator(".live-responses-table .response").first
    expect(answer).to_contain_text("200")
    expect(answer).to_contain_text("request_id")
    found = re.search(r'"request_id":\s*"([^"]+)"', answer.inner_text())
    assert found

    with Client(stack.url, ADMIN) as client:
        result = client.result(request_id=found[1], timeout=50)
    assert (result["status"], result["result"]) == ("Completed", {"sum": 42, "words": ["a"]})
    assert browser.complaints == []
    assert browser.elsewhere == []


def test_what_a_job_needs_is_asked_for(browser: Browser) -> None:
    """A required parameter that is empty, or is no number, is not sent."""
    page = browser.open("/docs")
    operation = page.locator(".opblock").filter(has_text="task/page_jobs.Add")
    operation.locator(".opblock-summary-control").click()
    operation.locator("tr[data-param-name=left] input").fill("forty")
    operation.locator("button.execute").click()
    expect(operation.locator("tr[data-param-name=left] input.invalid")).to_be_visible()

    assert not [url for url in browser.asked if "/task/" in url]


def test_the_first_page(browser: Browser) -> None:
    """Signing in shows what runs here, signing out hides it."""
    page = browser.open("/")
    expect(page.locator("#version")).to_contain_text("core4-jobs")
    page.fill("input[name=username]", ADMIN[0])
    page.fill("input[name=password]", "wrong")
    page.click("#login button")
    expect(page.locator("#refused")).to_contain_text("wrong")
    page.fill("input[name=password]", ADMIN[1])
    page.click("#login button")
    expect(page.locator("#user")).to_have_text(ADMIN[0])
    expect(page.locator("#workers tr")).to_have_count(1)
    page.click("#logout")
    expect(page.locator("#signed-out")).to_be_visible()

    assert browser.elsewhere == []
