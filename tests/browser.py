"""Open a page in a headless Chromium and record its requests, messages and charts."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip
TIMEOUT = 120_000  # ms; high, as the machine can be busy
# The marks of a chart in Vega's SVG; the marks of axes and legends have other roles.
MARKS = "g.role-mark path, g.role-mark rect, g.role-mark line, g.role-mark text"


@dataclass
class Opened:
    """An open page with its requests and its error and console messages."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def marks(self) -> list[int]:
        """Return the number of marks in each chart of the page."""
        return self.page.eval_on_selector_all(
            "[data-chart]", f"all => all.map(one => one.querySelectorAll('{MARKS}').length)"
        )


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium; skip the test if it or playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as driver:
        installed = next(filter(None, map(shutil.which, NAMES)), driver.chromium.executable_path)
        if not Path(installed).exists():
            pytest.skip("no Chromium is installed (`playwright install chromium`)")
        chromium = driver.chromium.launch(executable_path=installed, args=list(QUIET))
        yield chromium
        chromium.close()


def opened(chromium: Any, file: Path, *, scheme: str = "light") -> Opened:
    """Open an HTML file and wait until its charts are drawn."""
    result = Opened(chromium.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900}))
    result.page.set_default_timeout(TIMEOUT)
    result.page.on("request", lambda request: result.requests.append(request.url))
    result.page.on("pageerror", lambda error: result.complaints.append(str(error)))
    result.page.on("console", lambda message: result.complaints.append(f"{message.type}: {message.text}"))
    result.page.goto(file.as_uri())
    result.page.wait_for_selector("html[data-drawn]", state="attached")
    return result
