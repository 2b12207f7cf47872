"""The page in a real browser; skipped, loudly, only where there is none, and never in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from folders import changed, estimate

from browser import NAMES, Browser, find_chromium, open_browser
from stepscope import runs
from stepscope.report import write_report
from stepscope.results.noise import NoiseScales

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason=f"NO BROWSER: the page is not tested in one. None of {', '.join(NAMES)} is on the PATH; "
    "run `make browser` as root, or install one (Debian: apt-get install chromium)",
)


@pytest.fixture
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "CI has no browser: `make browser` did not install one"
    with open_browser(CHROMIUM) as found:
        yield found


DRAWN = """[...document.querySelectorAll('.canvas')]
    .filter(d => d.checkVisibility())
    .every(d => d.querySelector('.main-svg'))"""


def draw_everything(browser: Browser) -> None:
    """What is off screen or folded is drawn for printing, too."""
    browser.wait_for("window.performance.getEntriesByName('stepscope ready').length")
    browser.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    browser.wait_for(DRAWN)


def given_noise(folder: Path) -> None:
    """Noise scales of the loss gradient with known numbers, that of the optimizer's metric unreliable."""
    path = folder / "noise.json"
    scale = runs.read_record(NoiseScales, path).sgd
    known = replace(estimate(212.0, 61.0, "prompts"), low=131.0, high=343.0)
    sgd = replace(scale, prompts=known, at_least=131.0, sequences=known.scaled(8.0), share_of_noise=0.93)
    doubted = replace(sgd, prompts=known.doubted("|G|^2 is 0.9 standard errors from zero"))
    changed(path, NoiseScales, sgd=sgd, preconditioned=doubted)


def test_the_page_works_in_a_browser(run_folder: Path, browser: Browser) -> None:
    given_noise(run_folder / "measure/step-10")
    page = write_report(run_folder)
    browser.open(page, width=1280, height=900)
    draw_everything(browser)
    assert browser.evaluate("document.title !== 'owned'")
    assert browser.evaluate("document.querySelectorAll('#m1').length && document.getElementById('m1').hidden")

    # Hovering a point of the change curve shows its value with error.
    box = browser.evaluate(
        """(() => { document.getElementById('fig-m0-change').scrollIntoView({behavior: 'instant'});
            const points = document.querySelectorAll('#fig-m0-change .scatterlayer path.point');
            const r = points[0].getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; })()"""
    )
    browser.move_mouse(box[0] - 40, box[1] - 40)
    browser.move_mouse(*box)
    browser.wait_for("document.querySelector('#fig-m0-change .hoverlayer').textContent.includes('±')")

    # Sorting: numbers as numbers, both ways.
    head = "document.querySelector('#table-m0-top-tokens th:last-child button')"
    cells = (
        "[...document.querySelectorAll('#table-m0-top-tokens td:last-child')].map(d => Number(d.dataset.v))"
    )
    browser.evaluate(f"{head}.click()")
    rising = browser.evaluate(cells)
    assert rising == sorted(rising)
    browser.evaluate(f"{head}.click()")
    assert browser.evaluate(cells) == sorted(rising, reverse=True)

    # The leaderboard: filters choose the rows, and sorting still works on what they leave.
    board = "document.querySelector('#table-m0-leaderboard')"
    cells = f"[...{board}.querySelectorAll('tbody tr')].map(r => r.children[%d].dataset.v)"
    names, kinds = cells % 0, cells % 1
    assert set(browser.evaluate(kinds)) == {"literature", "control", "model"}
    choose = "{const s = %s.querySelector('[data-filter=%s]'); s.value = '%s'; s.onchange();}"
    browser.evaluate(choose % (board, "kind", "literature"))
    assert set(browser.evaluate(kinds)) == {"literature"}
    browser.evaluate(f"{board}.querySelectorAll('th button')[0].click()")
    shown = browser.evaluate(names)
    assert shown == sorted(shown, key=str.lower)
    browser.evaluate(choose % (board, "truth", "row fixed_prefix"))
    assert set(browser.evaluate(names)) <= set(shown)

    # Tables and responses by what they contain.
    top = "document.querySelector('#table-m0-top-tokens')"
    found = f"[...{top}.querySelectorAll('tbody tr')].filter(r => !r.hidden).length"
    everything = browser.evaluate(found)
    browser.evaluate(
        f"{{const i = {top}.querySelector('[data-find]');"
        f"i.value = {top}.querySelector('td.num').textContent; i.dispatchEvent(new Event('input'));}}"
    )
    assert 0 < browser.evaluate(found) < everything
    verdicts = "new Set([...document.querySelectorAll('#m0-responses .response')].filter(r => !r.hidden)"
    verdicts += ".map(r => r.dataset.verdict)).size"
    assert browser.evaluate(verdicts) == 2
    browser.evaluate(
        "{const s = document.querySelector('#m0-responses [data-verdicts]'); s.value = 'wrong';"
        "s.dispatchEvent(new Event('change'));}"
    )
    assert browser.evaluate(verdicts) == 1

    # CSV: one row per table row, value, error and reason apart, formulas of a run defused.
    csv = browser.evaluate(
        """(async () => { let blob; URL.createObjectURL = b => { blob = b; return 'data:,'; };
            document.querySelector('#table-m0-noise [data-csv]').click(); return blob.text(); })()"""
    )
    lines = csv.strip().split("\r\n")
    assert lines[0].startswith('Signal,"Noise scale, prompts","Noise scale, prompts (standard error)",')
    assert lines[1].startswith("loss gradient,212.0,61.0,,131.0,343.0,1696.0,488.0,,0.93,")
    assert "|G|^2 is 0.9 standard errors from zero" in lines[2]

    # Tokens: the arrow keys walk through a response and tell each token's figures.
    browser.evaluate("document.querySelector('#m0-influence .tokens').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.evaluate("document.querySelectorAll('.t.on').length") == 1
    assert "influence" in browser.evaluate("document.getElementById('tip').textContent")

    # Tabs by keyboard; the other measurement draws when it is shown.
    browser.evaluate("document.getElementById('tab-m0').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.getElementById('m0').hidden && !document.getElementById('m1').hidden")
    draw_everything(browser)

    # Export, the other theme, and a phone's width without sideways scrolling.
    assert browser.evaluate(
        """(async () => { const d = document.querySelector('#fig-m1-change .canvas');
            return (await Plotly.toImage(d, {format: 'svg'})).startsWith('data:image/svg'); })()"""
    )
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    browser.open(page, width=390, height=900, dark=True)
    draw_everything(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390

    assert browser.errors == []
    assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == {
        page.resolve().as_uri()
    }
