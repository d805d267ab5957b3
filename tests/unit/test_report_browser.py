# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages of reports in a real browser: opened from a file, filtered, linked to, printed."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from test_report_documents import NASTY, run_dir, verdict
from test_report_formats import evidence, make_run
from web import PHONE, Browser, browser

from harness.abi import load_clauses
from harness.build.series import Patch, Series
from harness.report import render
from harness.report.html import UNFOLDED
from harness.report.model import Outcome
from harness.series.history import Judged
from harness.series.page import FILE_NAME, write_page

__all__ = ["browser", "run_dir"]

LOAD_CPU_S = 2.0
"""How much of a processor the page of a big run may take until it can be used."""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """The page of a run on two targets: more failures than are unfolded, in several groups."""
    place = tmp_path / "many"
    paths = evidence(place)
    names = list(load_clauses())
    bad = [
        verdict(name, "FAIL", test=f"tests/a.py::test_{number}", evidence=paths, reason=NASTY)
        for number, name in enumerate(names[60 : 60 + UNFOLDED + 3])
    ]
    make_run(
        place,
        verdict("HOOK-OK", "PASS"),
        verdict("HOOK-OK", "FAIL", target="bochs"),
        verdict("HOOK-ABI", "PASS"),
        verdict("HOOK-ENOMEM", "SKIP", target="bochs"),
        verdict("UNHOOK-ABI", "PASS", target="bochs"),
        verdict("UNHOOK-FREES", "ERROR"),
        *bad,
    )
    render(place, ["html"])
    return place / "report.html"


@pytest.fixture
def series_page(tmp_path: Path) -> Path:
    """The page of a series of which one patch breaks a clause, and another does not build."""
    folder = tmp_path / "linux"
    folder.mkdir()
    patches = []
    for number in range(1, 7):
        path = folder / f"{number:04d}-p.patch"
        path.write_text(f"Subject: [PATCH] kvm: step {number} & <b>more</b>\n\n---\n")
        patches.append(Patch(path=path, content=path.read_bytes()))
    for name in ("clauses.csv", "judged.jsonl"):
        (tmp_path / name).touch()
    run = make_run(tmp_path / "0004" / "reports" / "r4", verdict("HOOK-OK", "FAIL"))
    render(run, ["html"])
    kept, broke, late = Outcome.PASS, Outcome.FAIL, Outcome.ERROR
    judged = [
        Judged(number=number, patch=f"{number:04d}-p.patch", digest=str(number),
               builds="" if hook else "no ';'", run=str(run) if number == 4 else "",
               verdicts={"HOOK-OK": hook, "UNHOOK-ABI": unhook} if hook else {})
        for number, (hook, unhook) in enumerate(
            [(broke, late), (kept, late), (None, late), (broke, late), (kept, kept), (kept, kept)],
            start=1,
        )
    ]  # fmt: skip
    series = Series(directory=folder, patches=tuple(patches))
    write_page(series, judged, tmp_path / FILE_NAME)
    return tmp_path / FILE_NAME


def test_page_needs_nothing_and_complains_about_nothing(browser: Browser, run_dir: Path) -> None:
    """Whatever stands in the evidence, the page asks for itself only, and has no errors."""
    render(run_dir, ["html"])
    page = run_dir / "report.html"
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.messages() == []
    assert browser.script("return performance.getEntriesByType('resource').length") == 0


def test_filters_combine(browser: Browser, many: Path) -> None:
    """Group, verdict and target: what is shown fits all of them, in every part of the page."""
    browser.open(many)
    rows = browser.shown(".row")
    problems = browser.shown(".problem")
    assert len(rows) == 5 + UNFOLDED + 3
    box = {
        one.get_attribute("value"): one
        for one in browser.driver.find_elements(By.CSS_SELECTOR, ".filter input[type=checkbox]")
    }
    assert list(box) == ["pass", "fail", "error", "skip", "tcg", "bochs"]
    box["tcg"].click()
    assert browser.shown(".row") == ["c-HOOK-OK", "c-HOOK-ENOMEM", "c-UNHOOK-ABI"]
    assert len(browser.shown(".problem")) == 1
    assert browser.one(".shown").text == f"3 of {len(rows)} clauses"
    box["fail"].click()
    assert browser.shown(".row") == ["c-HOOK-ENOMEM", "c-UNHOOK-ABI"]
    assert browser.shown(".problem") == []
    assert not browser.one("#problems").is_displayed()
    box["tcg"].click()
    box["bochs"].click()
    # It failed on the other target only.
    assert browser.shown(".row") == ["c-HOOK-ABI", "c-HOOK-OK", "c-UNHOOK-FREES"]
    Select(browser.one(".filter select")).select_by_visible_text("HOOK ioctl")
    assert browser.shown(".row") == ["c-HOOK-ABI", "c-HOOK-OK"]
    browser.one(".filter input[type=search]").send_keys("test_hook-abi")
    assert browser.shown(".row") == ["c-HOOK-ABI"]
    browser.one(".filter button").click()
    browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert (browser.shown(".row"), browser.shown(".problem")) == (rows, problems)
    assert browser.one(".shown").text == ""


def test_filters_by_keyboard(browser: Browser, many: Path) -> None:
    """All of them can be reached, used and seen without a mouse."""
    browser.open(many)
    focused = "return document.activeElement.matches(arguments[0])"

    def tab_to(selector: str) -> None:
        for _ in range(30):
            ActionChains(browser.driver).send_keys(Keys.TAB).perform()
            if browser.driver.execute_script(focused, selector):
                return
        pytest.fail(f"{selector} cannot be reached by Tab")

    tab_to(".filter input[type=search]")
    assert browser.script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    ActionChains(browser.driver).send_keys("hook-").perform()
    assert set(browser.shown(".row")) >= {"c-HOOK-OK", "c-HOOK-ABI"}
    tab_to(".filter select")
    ActionChains(browser.driver).send_keys("HOOK").perform()
    assert browser.shown(".row") == ["c-HOOK-ABI", "c-HOOK-OK", "c-HOOK-ENOMEM"]
    tab_to(".filter input[value=pass]")
    ActionChains(browser.driver).send_keys(Keys.SPACE).perform()
    assert browser.shown(".row") == ["c-HOOK-OK", "c-HOOK-ENOMEM"]
    tab_to(".filter button")
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(browser.shown(".row")) == 5 + UNFOLDED + 3


def test_a_link_opens_what_it_leads_to(browser: Browser, many: Path) -> None:
    """Folded failures and clauses are shown, also when they were filtered out."""
    browser.open(many)
    anchors = browser.script(
        "return [...document.querySelectorAll('.problem')].map((one) => one.id)"
    )
    folded = anchors[UNFOLDED + 1]
    in_view = (
        "const at = document.getElementById(arguments[0]).getBoundingClientRect();"
        "return at.top >= 0 && at.top < innerHeight"
    )
    browser.open(many, f"#{folded}")
    assert browser.script(f"return document.querySelector('#{folded} > .whole').open")
    assert browser.driver.execute_script(in_view, folded)
    closed = "c-HOOK-ENOMEM"
    assert browser.script(f"return document.getElementById('{closed}').checkVisibility()")
    browser.one(".filter input[value=skip]").click()
    assert not browser.script(f"return document.getElementById('{closed}').checkVisibility()")
    browser.script(f"location.hash = '{closed}'")
    browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert browser.script(f"return document.getElementById('{closed}').checkVisibility()")
    assert browser.driver.execute_script(in_view, closed)


def test_without_scripts_everything_is_there(browser: Browser, many: Path) -> None:
    """Where scripts are forbidden, there are no controls that do nothing."""
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(many)
        assert not browser.one(".filter").is_displayed()
        assert not browser.one("button.copy").is_displayed()
        assert len(browser.driver.find_elements(By.CSS_SELECTOR, ".row")) == 5 + UNFOLDED + 3
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("which", ["many", "series_page"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser: Browser, which: str, request: pytest.FixtureRequest
) -> None:
    """Tables scroll within themselves; all else fits, unfolded as well."""
    browser.open(request.getfixturevalue(which), size=PHONE)
    browser.shown(".row")
    wide = browser.script(
        "const own = '.scroller, pre, svg, .skip-link, .visually-hidden';"
        "return [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() &&"
        " !one.closest(own) && one.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((one) => one.outerHTML)"
    )
    assert wide == []
    assert browser.script("return document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("which", ["many", "series_page"])
def test_on_paper_all_is_unfolded(
    browser: Browser, which: str, request: pytest.FixtureRequest
) -> None:
    """No controls, nothing folded; and on the screen it is as before afterwards."""
    browser.open(request.getfixturevalue(which))
    folded = "return document.querySelectorAll('details:not([open])').length"
    before = browser.script(folded)
    assert before > 0
    browser.script("addEventListener('beforeprint', () => { window.printed = true; })")
    document = base64.b64decode(browser.command("Page.printToPDF")["data"])
    assert document.startswith(b"%PDF")
    assert browser.script("return window.printed") is True
    assert browser.script(folded) == before
    browser.command("Emulation.setEmulatedMedia", media="print")
    try:
        hidden = browser.script(
            # Links to files lead nowhere on paper.
            "return [...document.querySelectorAll('details > :not(summary, .files)')]"
            ".filter((one) => !one.hidden && !one.checkVisibility()).length"
        )
        assert hidden == 0
        assert not browser.one(".filter").is_displayed()
        assert not browser.one("nav").is_displayed()
    finally:
        browser.command("Emulation.setEmulatedMedia", media="")


def test_patches_down_and_groups_across(browser: Browser, series_page: Path) -> None:
    """Since which patch a clause holds, which breaks it, which does not build; links to runs."""
    browser.open(series_page)
    assert browser.messages() == []
    assert browser.requests() == [series_page.as_uri()]
    assert browser.one("h1").text == "Patch 3 does not build, patch 4 breaks HOOK-OK"
    assert "does not build: no ';'" in browser.one("#p3").text
    assert "breaks HOOK-OK" in browser.one("#p4").text
    cells = browser.script(
        "return [...document.querySelectorAll('.matrix tbody tr')].map((row) =>"
        " [...row.querySelectorAll('td')].map((cell) => cell.className))"
    )
    assert cells == [
        ["none", "none"], ["all", "none"], ["stopped", "stopped"], ["broke", "none"],
        ["all", "all"], ["all", "all"],
    ]  # fmt: skip
    browser.shown(".row")
    story = browser.one("#c-HOOK-OK").text
    assert "holds since patch 2, broken by patch 4, holds again since patch 5" in story
    assert browser.script("return document.querySelectorAll('#c-HOOK-OK rect').length") == 4
    browser.one(".filter input[type=search]").send_keys("broken by patch 4")
    assert browser.shown(".row") == ["c-HOOK-OK"]
    browser.one("#p4 .breaks a").click()
    assert browser.driver.current_url.endswith("0004/reports/r4/report.html#c-HOOK-OK")
    assert browser.one("#c-HOOK-OK").is_displayed()
    browser.one("header a").click()
    assert browser.driver.current_url == series_page.as_uri()


def test_a_big_run_can_be_used(browser: Browser, tmp_path: Path) -> None:
    """All clauses, a thousand tests, a good part of them failed: opened and filtered at once."""
    paths = evidence(tmp_path)
    lines = (tmp_path / paths["transcript"]).read_text().splitlines()
    (tmp_path / paths["transcript"]).write_text("\n".join([*lines, *lines[1:] * 80]))
    names = list(load_clauses())
    verdicts = [
        verdict(
            names[(3 * number + part) % len(names)],
            "FAIL" if number % 10 == 0 else "PASS",
            test=f"tests/a.py::test_{number}",
            evidence=paths,
            description="A description of what this test does, of usual length.",
        )
        for number in range(1000)
        for part in range(3)
    ]
    make_run(tmp_path, *verdicts)
    render(tmp_path, ["html"])
    begun = browser.cpu_s()
    browser.open(tmp_path / "report.html")
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, ".row")) == len(names)
    assert browser.cpu_s() - begun < LOAD_CPU_S
    begun = browser.cpu_s()
    browser.one(".filter input[value=pass]").click()
    assert browser.one(".shown").text
    assert browser.cpu_s() - begun < LOAD_CPU_S / 2
