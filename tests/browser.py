"""A page opened in a headless Chromium that may load nothing else, and what became of it."""

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
PATIENCE = 120_000  # ms; a busy machine is no fault of the page
# What a chart's marks are in the SVG that Vega draws; axes and legends are marks too, but with other roles.
MARKS = "g.role-mark path, g.role-mark rect, g.role-mark line, g.role-mark text"


@dataclass
class Opened:
    """A page with the requests it made, and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def marks(self) -> list[int]:
        """How many marks each chart of the page has drawn."""
        return self.page.eval_on_selector_all(
            "[data-chart]", f"all => all.map(one => one.querySelectorAll('{MARKS}').length)"
        )


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A Chromium; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as driver:
        installed = next(filter(None, map(shutil.which, NAMES)), driver.chromium.executable_path)
        if not Path(installed).exists():
            pytest.skip("no Chromium is installed (`playwright install chromium`)")
        chromium = driver.chromium.launch(executable_path=installed, args=list(QUIET))
        yield chromium
        chromium.close()


def opened(chromium: Any, file: Path, *, scheme: str = "light") -> Opened:
    """Open a file and wait until its charts are drawn."""
    found = Opened(chromium.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900}))
    found.page.set_default_timeout(PATIENCE)
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    found.page.goto(file.as_uri())
    found.page.wait_for_selector("html[data-drawn]", state="attached")
    return found
