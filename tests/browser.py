"""A real headless Chromium for tests of web pages, and what went wrong in it.

    with opened_chromium() as browser:
        with opened_page(browser) as visit:
            visit.page.goto(url)
            ...

Every page is watched. An error or warning on its console (a 4xx or 5xx is one), an
exception in its scripts, a request that failed (but not one that the page itself gave
up) and a request to another host are `problems`; `opened_page` fails at its end if one
is left that the test did not expect.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

CHROMIUM = "RLLIB_ARPO_CHROMIUM"
WITHOUT_CHROMIUM = (
    "Chromium is not installed: `apt-get install chromium`, or name another one's "
    f"program in {CHROMIUM}"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL_SCHEMES = ("file", "data", "blob", "about")
LOCAL_HOSTS = ("127.0.0.1", "localhost")
TIMEOUT_MS = 60_000


@dataclass(slots=True)
class Visit:
    """An open page.

    Attributes:
        page: of Playwright.
        problems: what went wrong so far, as text.
    """

    page: Page
    problems: list[str] = field(default_factory=list)

    def expect_problem(self, part: str) -> None:
        """Drop the problems that contain `part`; there must be one."""
        left = [problem for problem in self.problems if part not in problem]
        assert len(left) < len(self.problems), (
            f"no problem of the page contains {part!r}: {self.problems}"
        )
        self.problems[:] = left


def chromium_program() -> str | None:
    """Path of the Chromium to run, or None where there is none."""
    return shutil.which(os.environ.get(CHROMIUM, "chromium"))


@contextmanager
def opened_chromium() -> Iterator[Browser]:
    """A headless Chromium; skips the test where none is installed.

    A start takes a second: share it among the tests of a module. Meanwhile Playwright
    runs an event loop in this thread, so `asyncio.run` cannot.
    """
    program = chromium_program()
    if program is None:
        pytest.skip(WITHOUT_CHROMIUM)
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened_page(browser: Browser, **options: Any) -> Iterator[Visit]:
    """A page with nothing stored.

    Args:
        browser: of `opened_chromium`.
        options: of Playwright's `Browser.new_context`, such as `viewport` and
            `color_scheme`.

    Raises:
        AssertionError: at the end, if a problem of the page is left.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    try:
        visit = Visit(context.new_page())
        _watch(visit)
        yield visit
        assert not visit.problems, "\n".join(visit.problems)
    finally:
        context.close()


def _watch(visit: Visit) -> None:
    page, problems = visit.page, visit.problems

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console {message.type}: {message.text}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("requestfailed", lambda request: _check_failure(request, problems))
    page.on("request", lambda request: _check_host(request.url, problems))


def _check_failure(request: Request, problems: list[str]) -> None:
    # What the page itself gave up. Chromium now and then says so of a stream, too,
    # that was read to its end.
    if request.failure != "net::ERR_ABORTED":
        problems.append(f"failed: {request.url} {request.failure}")


def _check_host(url: str, problems: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme not in LOCAL_SCHEMES and parts.hostname not in LOCAL_HOSTS:
        problems.append(f"outside request: {url}")
