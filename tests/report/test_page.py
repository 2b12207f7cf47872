from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import HOSTILE, changed, estimate, write_log
from markupsafe import escape
from safetensors.numpy import load_file

from pages import held, unpacked
from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.report import text, write_comparison, write_report
from stepscope.report.sections.responses import join_tokens
from stepscope.report.units import unit_of
from stepscope.results import RolloutTokens
from stepscope.results.change import Changes, Taken
from stepscope.results.kernel import KernelReport
from stepscope.results.step import Rounding, Routing, SequenceShares, StepReport, Storage, StoredTensor
from stepscope.results.summary import Summary

LARGEST_PAGE = 2_000_000
PLOTLY = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
"""SHA-256 of plotly-cartesian.min.js in npm's plotly.js-cartesian-dist-min 4.1.1."""


class Page(HTMLParser):
    """Ids, links, sections and embedded figures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self._script: str | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = held(self.source)
        self.figures: list[dict] = [found for found in self.data if "layout" in found]
        self.boards: list[dict] = [found for found in self.data if "filters" in found]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))
        if found.get("src") or (tag == "link" and found.get("href")):
            self.loads.append(str(found.get("src") or found["href"]))
        if tag == "script":
            self._script = found.get("type") or "javascript"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script == "javascript":
            self.scripts.append(data)


@pytest.fixture
def run_page(run_folder: Path) -> Page:
    return Page(write_report(run_folder))


def sections_of(page: Page, panel: str = "m0") -> list[str]:
    return [i.removeprefix(f"{panel}-") for i in page.ids if i.startswith(f"{panel}-")]


def test_a_measurement_has_every_section(measure_folder: Path) -> None:
    path = write_report(measure_folder)
    assert path == measure_folder / "report.html"
    assert sections_of(Page(path)) == [
        "answer",
        "explore",
        "kinds",
        "trust",
        "remedies",
        "headline",
        "provenance",
        "change",
        "step",
        "influence",
        "validation",
        "kernel",
        "models",
        "curvature",
        "kinship",
        "noise",
        "criteria",
        "frontier",
        "responses",
    ]


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["change.json"], {"answer", "change"}),
        (["step.json"], {"step"}),
        (
            ["influence_sequences.parquet", "influence_tokens.parquet"],
            {"explore", "kinds", "influence"},
        ),
        (["validation.json"], {"validation"}),
        (["kernel.json", "kernel.safetensors"], {"kernel"}),
        (["models.json"], {"models"}),
        (["curvature.json", "curvature.safetensors"], {"curvature"}),
        (["kinship.json"], {"kinship"}),
        (["noise.json"], {"noise"}),
        (["criteria.json"], {"criteria"}),
        (["pareto.json"], {"remedies"}),
        (["frontier.json"], {"frontier"}),
        (["provenance.json", "config.yaml"], {"provenance"}),
        (["update.parquet", "probe.parquet"], {"explore", "kinds", "responses"}),
    ],
)
def test_a_missing_artifact_leaves_only_its_section_out(
    measure_folder: Path, missing: list[str], gone: set[str]
) -> None:
    before = sections_of(Page(write_report(measure_folder)))
    for name in missing:
        (measure_folder / name).unlink()
    after = sections_of(Page(write_report(measure_folder)))
    assert after == [section for section in before if section not in gone]


def test_a_rounded_step_is_told_and_heads_the_page(measure_folder: Path) -> None:
    """A training in bfloat16: the headline is what it does, the step's section what rounding took."""
    true = estimate(-0.000125, 0.00001)
    taken = Taken(true, estimate(-0.003, 0.0004), true, estimate(0.04, 0.003, "1"), 60.0, 0.1)
    changed(measure_folder / "change.json", Changes, taken=taken)
    rounding = Rounding("bfloat16", "fused", 1e-4, share_moved=0.0055, cosine=0.104, norm_ratio=0.16)
    changed(measure_folder / "step.json", StepReport, rounding=rounding)
    said = " ".join(Page(write_report(measure_folder)).source.replace("\u00a0", " ").split())
    unit = unit_of(runs.read_record(Changes, measure_folder / "change.json"))
    size = text.bare(unit.change(true.scaled(-1.0)))
    assert f"lowers the policy&#39;s entropy by ({size}) {unit.times}" in said
    assert "0.55 % of the weights move at all; the rounded step has cosine 0.104" in said
    assert "0.0400 ± 0.0030 of it is left" in said
    nothing = replace(rounding, share_moved=0.0, cosine=float("nan"), norm_ratio=0.0)
    changed(measure_folder / "step.json", StepReport, rounding=nothing)
    said = Page(write_report(measure_folder)).source.replace("\u00a0", " ")
    assert "0 % of the weights move at all; so that the step changes nothing." in said


def test_whose_gradient_it_is_is_told(measure_folder: Path) -> None:
    shares = SequenceShares((0.1, 0.95, -0.05), (0.4, 2.0, 0.3), largest=1, effective=1.09)
    changed(measure_folder / "step.json", StepReport, gradient=shares)
    said = " ".join(Page(write_report(measure_folder)).source.replace("\u00a0", " ").split())
    assert "The gradient is made by as many as 1.09 of the batch&#39;s 3 sequences" in said
    assert "the largest share has sequence 1, 95 % (norm 2.00)." in said


def test_flips_of_routers_are_told(measure_folder: Path) -> None:
    routing = Routing(1e-4, 96, 2, share_choices=0.031, share_tokens=0.25, share_by_layer=(0.012, 0.05))
    changed(measure_folder / "step.json", StepReport, routing=routing)
    said = " ".join(Page(write_report(measure_folder)).source.replace("\u00a0", " ").split())
    assert (
        "the step flips 3.1 % of the routers&#39; choices on its own batch, most of them in layer 1" in said
    )
    assert "25 % of the tokens go to other experts somewhere" in said
    still = replace(routing, share_choices=0.0, share_tokens=0.0, share_by_layer=(0.0, 0.0))
    changed(measure_folder / "step.json", StepReport, routing=still)
    assert "The step flips no choice of an expert" in Page(write_report(measure_folder)).source


def test_moments_in_8_bits_are_told(measure_folder: Path) -> None:
    moments = {"exp_avg": StoredTensor(typical=0.012, worst=0.02, zeros=0.0)}
    storage = Storage(
        "8 bits in blocks of 256",
        share=0.97,
        tensors=moments,
        gradient_part=0.02,
        direction=0.034,
        direction_worst=2.5,
        cosine=0.999,
    )
    changed(measure_folder / "step.json", StepReport, storage=storage)
    said = " ".join(Page(write_report(measure_folder)).source.replace("\u00a0", " ").split())
    assert "the moments of 97 % of its weights in 8 bits in blocks of 256" in said
    assert "differ by 3.4 % of its norm typically, and by 2.5 times its norm at most" in said


def test_a_summary_alone_makes_a_page(tmp_path: Path, measure_folder: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/summary.json").write_text((measure_folder / "summary.json").read_text())
    assert sections_of(Page(write_report(tmp_path / "bare"))) == ["trust", "headline"]


def test_run_page_shows_training_and_every_measurement(run_page: Page) -> None:
    assert {"training", "checkpoints", "m0", "m1", "tab-m0", "tab-m1", "glossary"} <= set(run_page.ids)
    assert {"fig-training-train-reward", "fig-training-train-entropy", "fig-training-eval-pass-0"} <= set(
        run_page.ids
    )
    assert "pass@1 from 0.520\u00a0±\u00a00.021 to 0.810\u00a0±\u00a00.021" in run_page.source


def test_a_run_without_measurements_or_evaluations_still_has_its_curves(run_folder: Path) -> None:
    (run_folder / "eval.parquet").unlink()
    for summary in run_folder.glob("measure/*/summary.json"):
        summary.unlink()
    page = Page(write_report(run_folder))
    assert len(page.figures) == 2
    assert "m0" not in page.ids


def test_evaluations_of_two_settings_are_not_mixed(run_folder: Path) -> None:
    table = pq.read_table(run_folder / "eval.parquet")
    pieces = [table.append_column("split", pa.array([split] * table.num_rows)) for split in ("train", "test")]
    pq.write_table(pa.concat_tables(pieces), run_folder / "eval.parquet")
    page = Page(write_report(run_folder))
    assert {"table-training-before-after-0", "table-training-before-after-1"} <= set(page.ids)
    assert "Accuracy on the problems evaluated, split train" in page.source
    curves = [t for f in page.figures for t in f["data"] if t.get("name") == "pass@1"]
    assert [t["x"] for t in curves] == [[0, 10, 20, 30, 40]] * 2


def test_warm_up_curve(run_folder: Path) -> None:
    rows = [{"step": 1, "loss": 5.0}, {"step": 8, "accuracy": 0.1, "format_rate": 0.5}]
    write_log(run_folder / "warmup", rows)
    assert "fig-training-warmup" in Page(write_report(run_folder)).ids


def test_kernel_of_another_batch_is_refused(measure_folder: Path) -> None:
    path = measure_folder / "kernel.json"
    prompts = runs.read_record(KernelReport, path).update_prompt_ids
    changed(path, KernelReport, update_prompt_ids=prompts[:-1])
    with pytest.raises(RunFolderError, match=rf"kernel\.json names {len(prompts) - 1} sequences"):
        write_report(measure_folder)


def test_heat_map_is_ordered_by_prompt(measure_folder: Path) -> None:
    path = measure_folder / "kernel.json"
    prompts = tuple(str(i % 4) for i in range(len(runs.read_record(KernelReport, path).update_prompt_ids)))
    changed(path, KernelReport, update_prompt_ids=prompts)
    page = Page(write_report(measure_folder))
    heat = next(t for f in page.figures for t in f["data"] if t["type"] == "heatmap")
    assert [prompts[int(i)] for i in heat["x"]] == sorted(prompts)
    cosine = load_file(measure_folder / "kernel.safetensors")["update_contributions_cosine"]
    assert heat["z"][1][0] == pytest.approx(cosine[4, 0], abs=5e-4)


def test_ids_are_unique_and_every_link_lands(run_page: Page) -> None:
    assert len(run_page.ids) == len(set(run_page.ids))
    assert {link[1:].partition("?")[0] for link in run_page.links} <= set(run_page.ids)
    assert all(link.startswith("#") for link in run_page.links)


def test_page_is_self_contained_and_small(run_folder: Path, run_page: Page) -> None:
    assert (run_folder / "report.html").stat().st_size < LARGEST_PAGE
    assert hashlib.sha256(unpacked(run_page.source, "plotly").encode()).hexdigest() == PLOTLY
    assert set(run_page.loads) <= {"data:,"}
    assert not re.search(r"https?://|@import|url\(", run_page.source)


def test_figures_are_valid_and_carry_no_template(run_page: Page) -> None:
    assert len(run_page.figures) > 15
    for figure in run_page.figures:
        go.Figure(figure)
        assert "template" not in figure["layout"]
        assert "NaN" not in json.dumps(figure)


def test_unreliable_points_are_hollow_and_say_why(measure_folder: Path) -> None:
    path = measure_folder / "change.json"
    first, *rest = runs.read_record(Changes, path).points
    why = "effective sample size 3.2 of 64, below 16"
    given = [replace(p, true=estimate(-0.1, 0.01)) for p in rest]
    changed(path, Changes, points=(replace(first, true=estimate(-0.1, 0.01).doubted(why)), *given))
    page = Page(write_report(measure_folder))
    true = next(t for f in page.figures for t in f["data"] if t.get("name") == "true")
    hollow = [symbol.endswith("-open") for symbol in true["marker"]["symbol"]]
    assert hollow == [True, *(False for _ in rest)]
    assert why in true["customdata"][0]


def test_numbers_of_the_figure_are_those_of_the_artifact(measure_folder: Path) -> None:
    page = Page(write_report(measure_folder))
    true = next(t for f in page.figures for t in f["data"] if t.get("name") == "true")
    points = [p.true for p in runs.read_record(Changes, measure_folder / "change.json").points]
    ends = [sorted((abs(p.value - p.low), abs(p.high - p.value))) for p in points]
    assert true["y"] == pytest.approx([abs(p.value) for p in points], rel=1e-4)
    bars = zip(true["error_y"]["array"], true["error_y"]["arrayminus"], strict=True)
    assert [sorted(pair) for pair in bars] == [pytest.approx(pair, rel=1e-3) for pair in ends]


def test_ends_of_the_range_are_drawn_where_they_lie_on_the_axis(measure_folder: Path) -> None:
    path = measure_folder / "change.json"
    others = runs.read_record(Changes, path).others
    without = tuple(replace(o, lr=1e-4, measurable_from=1e-12, linear_up_to=None) for o in others)
    changed(path, Changes, lr=1e-4, measurable_from=3.2e-5, linear_up_to=4e-4, others=without)
    page = Page(write_report(measure_folder))
    rates = [
        f["layout"]
        for f in page.figures
        if f["layout"]["xaxis"].get("title", {}).get("text") == "learning rate"
    ]
    primary, *further = rates
    assert sorted(s["x0"] for s in primary["shapes"]) == [3.2e-5, 1e-4, 4e-4]
    notes = {a["text"]: a["x"] for a in primary["annotations"]}
    assert notes == pytest.approx(
        {
            "own lr 1e-4": -4,
            "measurable from 3.2e-5": np.log10(3.2e-5),
            "linear up to 4e-4": np.log10(4e-4),
        }
    )
    assert further
    assert all([s["x0"] for s in layout["shapes"]] == [1e-4] for layout in further)


def test_a_checkpoint_whose_learning_rate_has_run_out(measure_folder: Path) -> None:
    path = measure_folder / "change.json"
    others = tuple(replace(o, lr=0.0) for o in runs.read_record(Changes, path).others)
    changed(path, Changes, lr=0.0, others=others)
    page = Page(write_report(measure_folder))
    assert "learning rate is 0" in page.source
    notes = [note["text"] for f in page.figures for note in f["layout"].get("annotations", [])]
    assert not [note for note in notes if note.startswith("own lr")]


def test_text_of_a_run_cannot_become_markup(measure_folder: Path) -> None:
    page = Page(write_report(measure_folder))
    assert str(escape(HOSTILE)) in page.source
    assert HOSTILE not in page.source
    assert len(page.scripts) == 1  # ours; plotly.js and data are packed


def test_report_can_be_rebuilt(measure_folder: Path) -> None:
    first = write_report(measure_folder).read_text()
    assert write_report(measure_folder).read_text() == first
    assert not list(measure_folder.glob("*.partial"))


def test_comparison_gives_differences_with_combined_errors(run_folder: Path, tmp_path: Path) -> None:
    for step, found in ((10, estimate(0.412, 0.018)), (40, estimate(0.1, 0.024))):
        changed(
            run_folder / f"measure/step-{step}/summary.json", Summary, figures={"entropy_per_token": found}
        )
    out = write_comparison(
        run_folder / "measure/step-10", run_folder / "measure/step-40", tmp_path / "new/cmp.html"
    )
    page = Page(out)
    assert {"comparison", "m0", "m1", "fig-comparison-overlay"} <= set(page.ids)
    row = re.search(r"<tr><td[^>]*><a[^>]*>Entropy of the policy, per token</a>.*?</tr>", page.source)
    assert row is not None
    values = [(float(v), float(e)) for v, e in re.findall(r'data-v="([^"]+)" data-e="([^"]+)"', row.group())]
    assert values[2] == pytest.approx((0.1 - 0.412, 0.03))
    assert "\u22120.372 to \u22120.252<" in row.group()
    assert ">resolved from zero<" in row.group()


def test_comparison_needs_measurements(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no summary\.json"):
        write_comparison(run_folder, run_folder / "measure/step-40", tmp_path / "c.html")


def test_tokens_without_a_text_are_named() -> None:
    """The end of a response, and the first bytes of a character that a later token completes."""
    tokens = RolloutTokens(
        sequence_id=np.array([0, 0, 0, 1]),
        position=np.array([0, 1, 2, 0]),
        token_id=np.zeros(4, dtype=np.int64),
        token=np.array(["", "😀", "", ""], dtype=object),
        logprob=np.zeros(4),
        entropy=np.zeros(4),
    )
    assert join_tokens(None, tokens).token.tolist() == ["⟨part⟩", "😀", "⟨end⟩", "⟨end⟩"]


def test_changes_of_the_entropy_have_its_unit_on_a_page_of_the_reward(measure_folder: Path) -> None:
    """Frontier and remedies beside a change whose quantity is another, or none."""
    stored = runs.read_record(Changes, measure_folder / "change.json")
    for changes in (replace(stored, quantity="reward", normalisation="per_seq"), None):
        if changes is None:
            (measure_folder / "change.json").unlink()
        else:
            points = tuple(
                replace(p, linear=replace(p.linear, unit="reward"), true=replace(p.true, unit="reward"))
                for p in stored.points
            )
            runs.write_record(measure_folder / "change.json", replace(changes, points=points))
        source = Page(write_report(measure_folder)).source.replace("\u00a0", " ")
        for words in ("Entropy gained, ", "Entropy kept, "):
            units = re.findall(f'{words}([^<">]*)[<"]', source)
            assert units, words
            assert all(unit.endswith("nats/token") for unit in units), units
