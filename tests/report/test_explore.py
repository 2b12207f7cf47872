"""The linked view of tokens in a real browser: choosing, searching, addresses, many tokens, and axe."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import many

from browser import NAMES, Browser, find_chromium, open_browser
from pages import held
from stepscope.report import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason=f"NO BROWSER: the linked view is not tested in one. None of {', '.join(NAMES)} is on the PATH; "
    "run `make browser` as root, or install one (Debian: apt-get install chromium)",
)

READY = "performance.getEntriesByName('stepscope ready').length"
BOX = "document.querySelector('.explore')"
ROWS = f"Number({BOX}.querySelector('table').getAttribute('aria-rowcount')) - 1"
TEXTS = f"[...{BOX}.querySelectorAll('tbody tr:not(.gap)')].map(r => [...r.cells].map(c => c.textContent))"
AXE = (
    "axe.run({exclude: ['.canvas', '.cloud', 'tbody tr:nth-child(n+6)', '.t:nth-child(n+60)'].map(s => [s])},"
    "{resultTypes: ['violations']})"
    ".then(found => found.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
    ".map(v => v.id + ': ' + v.nodes.slice(0, 3).map(n => n.target.join(' ')).join(', ')))"
)


@pytest.fixture
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "CI has no browser: `make browser` did not install one"
    with open_browser(CHROMIUM) as found:
        yield found


def view_of(page: Path) -> dict:
    """What the page holds for the view."""
    return next(found for found in held(page.read_text()) if "vocabulary" in found)


def choose(browser: Browser, key: str, value: str) -> None:
    browser.evaluate(
        f"{{const s = {BOX}.querySelector('[data-choice={key}]'); s.value = {value!r};"
        "s.dispatchEvent(new Event('change'));}"
    )


def test_a_class_a_point_and_a_word_choose_and_everything_follows(
    measure_folder: Path, browser: Browser
) -> None:
    page = write_report(measure_folder)
    view = view_of(page)
    browser.open(page, width=1280, height=900)
    browser.wait_for(READY)
    count = len(view["text"])
    assert browser.evaluate(ROWS) == count

    # A bar: table, sentence, address and list of responses are those of its class.
    labels, codes = view["classes"]["quadrant"]["labels"], view["classes"]["quadrant"]["codes"]
    sizes = {label: codes.count(number) for number, label in enumerate(labels)}
    chosen = min((label for label in labels if sizes[label] > 1), key=sizes.__getitem__)
    browser.evaluate(f'{BOX}.querySelector(`.bars [data-class="{chosen}"]`).click()')
    assert browser.evaluate(ROWS) == sizes[chosen]
    assert f"{sizes[chosen]:,} of {count:,} tokens" in browser.evaluate(f"{BOX}.textContent")
    assert {row[7] for row in browser.evaluate(TEXTS)} == {chosen}
    assert "class=" in browser.evaluate("location.hash")

    # The largest influence of the class comes first; sorting by another column turns that.
    first = browser.evaluate(f"{TEXTS}[0]")
    sizes_of = [
        abs(v) for v, code in zip(view["columns"]["influence"], codes, strict=True) if labels[code] == chosen
    ]
    shown = float(first[1].split(" ± ")[0].replace("\u2212", "-"))
    assert abs(shown) == pytest.approx(max(sizes_of), rel=1e-2)
    browser.evaluate(f"{BOX}.querySelectorAll('th button')[5].click()")
    entropies = [float(row[5].replace("\u2212", "-")) for row in browser.evaluate(TEXTS)]
    assert entropies == sorted(entropies, reverse=True)

    # A token of the table is read in its response, beside another one to its prompt.
    browser.evaluate(f"{BOX}.querySelector('tbody .token').click()")
    assert browser.evaluate(f"{BOX}.querySelectorAll('.read .t.mark').length") == 1
    assert browser.evaluate(f"{BOX}.querySelectorAll('.read .beside .tokens').length") == 2
    response = browser.evaluate(f"{BOX}.querySelector('tr.on').cells[9].textContent")
    assert f"Response {response}" in browser.evaluate(f"{BOX}.querySelector('.read').textContent")
    assert re.search(rf"token={response}\.\d+", browser.evaluate("location.hash"))

    # A point of the figure chooses its token.
    browser.evaluate(f"{BOX}.scrollIntoView()")
    browser.wait_for(f"{BOX}.querySelector('.cloud .points path')")
    other = browser.evaluate(
        f"{BOX}.querySelector('.cloud').data.find(t => t.customdata.length).customdata[0]"
    )
    browser.evaluate(
        f"{BOX}.querySelector('.cloud').emit('plotly_click', {{points: [{{customdata: {other}}}]}})"
    )
    marked = f"Number({BOX}.querySelector('.read .t.mark').dataset.i)"
    assert browser.evaluate(marked) == other

    # Another colour keeps blue and orange for influence.
    browser.evaluate(f"{BOX}.querySelector('.controls button').click()")
    assert browser.evaluate(ROWS) == count
    browser.evaluate(f"{BOX}.querySelector('tbody .token').click()")
    classes = f"[...{BOX}.querySelectorAll('.read .t')].flatMap(t => [...t.classList])"
    assert {name[0] for name in browser.evaluate(classes) if re.fullmatch(r"[a-z]\d", name)} <= {"n", "p"}
    choose(browser, "colour", "entropy")
    assert {name[0] for name in browser.evaluate(classes) if re.fullmatch(r"[a-z]\d", name)} == {"q"}
    criterion = next(iter(view["levels"]))
    choose(browser, "colour", criterion)
    assert f"colour={criterion}" in browser.evaluate("location.hash")

    # A word leaves the responses that hold it.
    start = [sum(s["length"] for s in view["sequences"][:n]) for n in range(len(view["sequences"]))]
    whole = [
        "".join(view["vocabulary"][t] for t in view["text"][a : a + s["length"]])
        for a, s in zip(start, view["sequences"], strict=True)
    ]
    word = whole[1][:12]
    browser.evaluate(
        f"{{const i = {BOX}.querySelector('[type=search]'); i.value = {word!r};"
        "i.dispatchEvent(new Event('input'));}"
    )
    wanted = sum(
        s["length"] for s, t in zip(view["sequences"], whole, strict=True) if word.lower() in t.lower()
    )
    assert 0 < wanted < count
    browser.wait_for(f"{ROWS} === {wanted}")
    assert browser.errors == []


def test_an_address_leads_back_to_what_was_chosen(measure_folder: Path, browser: Browser) -> None:
    page = write_report(measure_folder)
    view = view_of(page)
    row = view["sequences"][2]
    browser.open(page, width=1280, height=900)
    browser.wait_for(READY)
    browser.evaluate(f"location.hash = '#m0-explore?token={row['id']}.3&colour=entropy'")
    browser.wait_for(f"{BOX}.querySelector('.read .t.mark')")
    browser.evaluate("location.reload()")
    browser.wait_for("document.readyState === 'complete'")
    browser.wait_for(f"{READY} && {BOX}.querySelector('.read .t.mark')")
    at = sum(s["length"] for s in view["sequences"][:2]) + 3
    assert browser.evaluate(f"Number({BOX}.querySelector('.read .t.mark').dataset.i)") == at
    assert browser.evaluate(f"{BOX}.querySelector('[data-choice=colour]').value") == "entropy"
    # A link of the first screen leads to its token, and one to a folded section opens it.
    place = browser.evaluate(
        "(() => { const a = document.querySelector('.culprits a'); a.click(); return a.hash; })()"
    )
    assert browser.evaluate("location.hash") == place
    token = place.split("token=")[1]
    browser.wait_for(f"{BOX}.querySelector('tr.on') && {BOX}.querySelector('.read .t.mark')")
    assert f"Response {token.split('.')[0]}" in browser.evaluate(f"{BOX}.querySelector('.read').textContent")
    browser.evaluate("location.hash = '#m0-step'")
    browser.wait_for("document.querySelector('#m0-step details').open")
    # What an address asks for and the page has not is passed over.
    browser.evaluate("location.hash = '#m0-explore?class=nonsense&token=99999.1&way=none'")
    browser.wait_for(f"{ROWS} === {len(view['text'])}")
    assert browser.errors == []


def test_a_hundred_thousand_tokens_are_fluid(measure_folder: Path, browser: Browser) -> None:
    page = write_report(many(measure_folder, 100_000))
    view = view_of(page)
    assert len(view["text"]) >= 100_000
    browser.open(page, width=1280, height=900)
    browser.wait_for(READY)
    assert browser.evaluate(ROWS) == len(view["text"])
    assert browser.evaluate(f"{BOX}.querySelectorAll('tbody tr').length") < 60
    code = view["classes"]["quadrant"]["labels"][0]
    for action in (
        f'{BOX}.querySelector(`.bars [data-class="{code}"]`).click()',
        f"{BOX}.querySelectorAll('th button')[1].click()",
        f"{BOX}.querySelectorAll('th button')[0].click()",
        f"{BOX}.querySelector('.scroll').scrollTop = 500000",
        f"{BOX}.querySelector('tbody .token').click()",
    ):
        timed = (
            f"(() => {{ const t = performance.now(); {action}; {BOX}.offsetHeight;"
            " return performance.now() - t; })()"
        )
        assert browser.evaluate(timed) < 1000, action
    assert browser.errors == []


def test_it_is_soon_there(measure_folder: Path, browser: Browser) -> None:
    """Until all but the figures stands. The best of three, since other processes take their time, too."""
    page = write_report(measure_folder)
    times = []
    for _ in range(3):
        browser.open(page, width=1280, height=900)
        browser.wait_for(READY)
        times.append(browser.evaluate("performance.getEntriesByName('stepscope ready')[0].startTime"))
    assert min(times) < 1000


def test_axe_finds_nothing_serious(run_folder: Path, browser: Browser) -> None:
    """In all but the drawings of figures, which captions say in words, and what repeats in long tables."""
    found = importlib.util.find_spec("axe_core_python")
    assert found is not None
    assert found.origin is not None
    axe = Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    shutil.rmtree(run_folder / "measure/step-40")
    page = write_report(run_folder)
    for dark, rules in ((False, ""), (True, "runOnly: ['color-contrast'], ")):
        browser.open(page, width=1280, height=900, dark=dark)
        browser.wait_for(READY)
        browser.evaluate(f"{BOX}.querySelector('tbody .token').click()")
        browser.evaluate("document.querySelectorAll('main details').forEach(d => { d.open = true; })")
        browser.evaluate(f"{axe};0")
        assert browser.evaluate(AXE.replace("resultTypes", f"{rules}resultTypes")) == []


def test_a_phone_scrolls_one_way(measure_folder: Path, browser: Browser) -> None:
    browser.open(write_report(measure_folder), width=360, height=740)
    browser.wait_for(READY)
    browser.evaluate(f"{BOX}.querySelector('tbody .token').click()")
    browser.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    time.sleep(1)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_choice_of_light_or_dark_stays(measure_folder: Path, browser: Browser) -> None:
    page = write_report(measure_folder)
    for expected in ("dark", "light"):
        browser.open(page, width=1280, height=900)
        browser.wait_for(READY)
        browser.evaluate("document.getElementById('theme').click()")
        browser.open(page, width=1280, height=900)
        browser.wait_for(READY)
        assert browser.evaluate("document.documentElement.dataset.theme") == expected
