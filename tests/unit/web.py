# SPDX-License-Identifier: GPL-2.0-or-later
"""A real browser for tests of pages: Debian's chromium with its driver.

``inv build.packages`` installs it. It is spoken to in its own protocol (DevTools), too, which
tells what a page asks for and what it complains about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.remote_connection import RemoteConnection
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from harness.build.packages import BROWSER_PACKAGES, apt_line, missing_packages
from harness.build.run import bound_to_us

__all__ = ["DESK", "PHONE", "Browser", "browser"]

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 3, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
LOAD_S = 60.0
"""A page that takes so long does not come."""


class _Driver(Service):
    """A driver that does not outlive us, nor the browser the driver: its pipe breaks."""

    def command_line_args(self) -> list[str]:
        return [*bound_to_us(["chromedriver"])[1:], *super().command_line_args()]


@dataclasses.dataclass(frozen=True)
class Browser:
    """A browser, and what the page that it shows has done so far."""

    driver: WebDriver

    def open(self, page: Path, fragment: str = "", *, size: dict[str, Any] = DESK) -> None:
        """Show a file as if for the first time; what was seen before is forgotten."""
        self.driver.get("about:blank")
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.messages()
        self.requests()
        self.driver.get(page.as_uri() + fragment)
        # A busy driver takes the end of loading the empty page for that of this one.
        WebDriverWait(self.driver, LOAD_S).until(lambda _: self._has_loaded(page.as_uri()))

    def _has_loaded(self, uri: str) -> bool:
        state, where = self.script("return [document.readyState, location.href]")
        return bool(state == "complete" and where.partition("#")[0] == uri)

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        found: dict[str, Any] = self.driver.execute_cdp_cmd(name, arguments)
        return found

    def script(self, text: str) -> Any:
        """What a script returns in the page."""
        return self.driver.execute_script(text)

    def messages(self) -> list[str]:
        """What the page wrote to its console since this was asked last, errors included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What was asked for since this was asked last, of whatever scheme."""
        entries = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]

    def one(self, selector: str) -> WebElement:
        """An element that must be there."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def shown(self, selector: str) -> list[str]:
        """Ids of those elements that can be seen, folded ones unfolded."""
        found: list[str] = self.script(
            "for (const fold of document.querySelectorAll('details')) fold.open = true;"
            f"return [...document.querySelectorAll({selector!r})]"
            ".filter((one) => one.checkVisibility()).map((one) => one.id)"
        )
        return found

    def cpu_s(self) -> float:
        """How much of a processor the page's process has taken."""
        metrics = self.command("Performance.getMetrics")["metrics"]
        return next(float(one["value"]) for one in metrics if one["name"] == "ProcessTime")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that can reach nothing, and of which nothing is left."""
    if missing := missing_packages(BROWSER_PACKAGES):
        pytest.skip(f"inv build.packages, or: {apt_line(missing)}")
    profile = tmp_path_factory.mktemp("profile")
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in (
        "--headless=new",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        # /dev/shm is small in containers.
        "--disable-dev-shm-usage",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # its sandbox refuses root
    driver = WebDriver(options=options, service=_Driver(bound_to_us(["chromedriver"])[0]))
    assert isinstance(driver.command_executor, RemoteConnection)
    driver.command_executor.client_config.timeout = 250  # a busy machine prints slowly
    try:
        driver.execute_cdp_cmd("Performance.enable", {})
        yield Browser(driver)
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)
    assert _processes_with(str(profile)) == []


def _processes_with(word: str) -> list[int]:
    """Processes whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found
