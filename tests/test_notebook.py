"""Results in a notebook: what is shown, drawn and put into data frames is what the results hold."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import plotly.io as pio
import pytest
from nbclient import NotebookClient

import cases
import stepscope as ss
from stepscope import notebook
from stepscope.measure.criteria.leaderboard import rank_criteria
from stepscope.measure.curvature.structure import pair_report
from stepscope.measure.kernel.models import ModelOptions
from stepscope.measure.kernel.null import NullOptions
from stepscope.report import text
from stepscope.results.brief import STYLE
from stepscope.results.frames import frame
from stepscope.results.kinship import KINS
from stepscope.results.views import Parts, Plotted, Readable, Shown
from stepscope.stats import Estimate

GALLERY = Path(__file__).parents[1] / "docs/notebooks"
SMALL = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
HOSTILE = '<script>alert(1)</script><img src=x onerror="x">'


@pytest.fixture(scope="module")
def found() -> Any:
    """What a user of the library has in memory, on a policy of a few thousand parameters."""
    policy = replace(cases.policy(), tokenizer=cases.tokenizer())
    update, probe = cases.batch(policy), cases.batch(policy, num_prompts=12, seed=1)
    step = ss.reconstruct_step(policy, update)
    change = ss.measure_change(policy, step, probe, quantity="entropy", lrs=[1e-4, 1e-3])
    shares = ss.influence(policy, step, update, probe, quantity="entropy")
    kernel = ss.fisher_kernel(policy, update, probe, preconditioner=step.preconditioner)
    noise = ss.noise_scale(policy, update)
    pairs = ss.second_order_kernel(policy, step, probe)
    quick = {"options": ModelOptions(folds=3, steps=2, inducing=4, pairs=30), "null": NullOptions(draws=9)}
    models = ss.kernel_models(policy, update, preconditioner=step.preconditioner, **quick)
    return SimpleNamespace(
        policy=policy,
        update=update,
        probe=probe,
        step=step,
        change=change,
        shares=shares,
        kernel=kernel,
        noise=noise,
        pairs=pairs,
        models=models,
        kinship=ss.kinship(policy, cases.step(policy, num_prompts=9, group_size=3)),
    )


def plain(html: str) -> str:
    """The text of a piece of HTML without its style."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))


def test_everything_in_memory_has_a_small_view_of_its_own(found: Any) -> None:
    for name in ("update", "step", "change", "shares", "kernel", "noise", "pairs", "models", "kinship"):
        shown = getattr(found, name)
        assert isinstance(shown, Shown), name
        html = shown._repr_html_()
        assert html.count("<div") == html.count("</div>") == 1, name
        assert STYLE in html, name
        assert "dataclass" not in html
        assert len(html) < 12_000, name
        if isinstance(shown, Plotted):
            assert len(shown.plot().data) > 0, name
        assert len(shown.to_pandas()) > 0, name


def test_a_figure_shows_the_numbers_of_the_table(found: Any) -> None:
    table = found.change.to_pandas()
    own = table[(table.normalisation == found.change.normalisation) & (table.version == found.change.version)]
    (marks,) = [trace for trace in found.change.plot().data if trace.name == "true"]
    assert list(marks.x) == pytest.approx(own.lr.to_list(), rel=1e-4)
    assert list(marks.y) == pytest.approx(own.true.abs().to_list(), rel=1e-4)
    high = own.true_high.where(own.true > 0, -own.true_low)
    assert list(marks.error_y.array) == pytest.approx((high - own.true.abs()).to_list(), rel=1e-4)
    assert [p.true.value for p in found.change.points] == own.true.to_list()


def test_influences_are_drawn_as_changes_by_the_step(found: Any) -> None:
    shares, rows = found.shares, found.shares.to_pandas()
    figure = shares.plot("influence-sequences")
    power = 10.0 ** int(re.search(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", figure.layout.yaxis.title.text)[1].translate(SMALL))
    drawn = sorted(y for trace in figure.data for y in trace.y)
    expected = sorted(shares.lr * shares.sequences / power)
    assert drawn == pytest.approx(expected, rel=1e-4)
    sequences = rows[rows.component == "sequence"]
    assert sequences.influence.to_numpy() == pytest.approx(shares.sequences, rel=1e-12)
    tokens = shares.to_pandas("token")
    assert tokens.groupby("sequence_id").influence.sum().to_numpy() == pytest.approx(shares.sequences)
    assert tokens.token_id.tolist() == [t for ids in found.update.response_token_ids for t in ids]
    whole = shares.total.scaled(shares.lr, unit="nats/token")
    assert text.bare(whole) in plain(shares._repr_html_())


def test_a_kernel_is_a_labelled_frame(found: Any) -> None:
    kernel, update = found.kernel, found.update
    whole = kernel.to_pandas("raw", cosine=True)
    assert (whole.to_numpy() == kernel.cosine("raw")).all()
    assert whole.index.get_level_values("update_prompt_id").tolist() == list(update.prompt_ids)
    across = kernel.to_pandas(probe=True)
    assert (across.to_numpy() == kernel.probe["preconditioned"]).all()
    assert across.index.names == ["probe_prompt_id", "probe_sequence_id"]
    assert across.columns.names == ["update_prompt_id", "update_sequence_id"]
    (heat,) = kernel.plot("kernel-raw").data
    assert np.asarray(heat.z, dtype=float).shape == (len(update), len(update))
    with pytest.raises(ss.StepscopeError, match="no kernel 'other'; there are raw, preconditioned"):
        kernel.to_pandas("other")


def test_second_order_rows_are_named(found: Any) -> None:
    pairs, count = found.pairs, len(found.update)
    table = pairs.to_pandas()
    assert (table.to_numpy() == pairs.whole.value).all()
    assert table.columns.tolist() == [*(f"sequence {k}" for k in range(count)), *pairs.parts]
    assert {"prompt 0", "sequence 0", "momentum"} <= set(table.index)
    prompt = table.loc["prompt 0"].to_numpy()
    own = [f"sequence {k}" for k in np.flatnonzero(pairs.prompts == 0)]
    assert prompt == pytest.approx(table.loc[own].sum().to_numpy())
    assert pair_report(pairs).to_pandas().part.tolist() == ["whole", "fisher", "rest"]


def test_kinship_and_models_are_drawn_with_their_intervals(found: Any) -> None:
    kinship, models = found.kinship, found.models
    figure = kinship.plot()
    power = re.search(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", figure.layout.yaxis.title.text)[1].translate(SMALL)
    factor = kinship.lr / 10.0 ** int(power)
    (marks,) = figure.data
    assert list(marks.x) == [KINS[row.kin] for row in kinship.kin]
    drawn, own = list(marks.y), [row.influence for row in kinship.kin]
    assert drawn == pytest.approx([factor * e.value for e in own], rel=1e-4)
    bars = [factor * (e.high - e.value) for e in own]
    assert list(marks.error_y.array) == pytest.approx(bars, rel=1e-4)
    figure = models.plot("kernel-models")
    rows = models.to_pandas().query("metric == 'preconditioned'").set_index("name")
    for marks, kind in zip(figure.data, ("diagonal", "same_prompt", "different_prompts"), strict=True):
        assert [name.replace(" ", "_") for name in marks.x] == rows.index.tolist()
        assert list(marks.y) == pytest.approx(rows[f"r2_{kind}"].to_list(), rel=1e-4)
    assert "The last layer alone is" in plain(models._repr_html_())


def test_a_leaderboard_shows_first_what_the_page_shows_first(found: Any) -> None:
    board = rank_criteria(found.policy, found.step, found.probe)
    table = board.to_pandas()
    assert len(table) == len(board.rows)
    primary = table.query(
        "level == 'token' and target == 'signed' and truth == 'column' and preconditioner == 'adamw' "
        "and version == 'on_policy'"
    )
    best = primary.loc[primary.spearman.abs().idxmax()]
    words = plain(board._repr_html_())
    assert words.index(best.criterion) < min(
        words.index(name) for name in set(primary.criterion) - {best.criterion} if name in words
    )
    traces = board.plot().data
    drawn = {name: value for trace in traces for name, value in zip(trace.y, trace.x, strict=True)}
    assert drawn[best.criterion] == pytest.approx(best.spearman, rel=1e-4)


def test_text_of_a_run_is_escaped(found: Any, tmp_path: Path) -> None:
    count = len(found.update)
    names = tuple(f"{HOSTILE}{i}" for i in range(count))
    texts = {"responses": (HOSTILE,) * count, "prompts": (HOSTILE,) * count}
    update = replace(found.update, prompt_ids=names, questions=None, **texts)
    tokens = update.token_rows([[HOSTILE] * len(ids) for ids in update.response_token_ids])
    whole = Parts(HOSTILE, {**found.shares._viewed().found, "update": update, "update_tokens": tokens})
    influences = notebook.responses(Parts("", {"update": update, "update_tokens": tokens}))
    page = tmp_path / "page.html"
    page.write_text(HOSTILE)
    for html in (
        update.show()._repr_html_(),
        influences._repr_html_(),
        notebook.html(whole),
        update._repr_html_(),
        tokens._repr_html_(),
        ss.show_report(page)._repr_html_(),
    ):
        assert "<script" not in html
        assert "<img" not in html
    assert "&lt;script&gt;" in update.show()._repr_html_()
    assert HOSTILE in repr(update.show())
    hover = notebook.figure(whole, "influence-tokens").to_json()
    assert "<script" not in hover.replace("\\u003c", "<")


def test_responses_are_coloured_by_influence_and_read_with_a_policy(found: Any) -> None:
    shown = found.shares.show(policy=found.policy)
    html = shown._repr_html_()
    assert len(html) < 60_000
    assert ".stepscope :is(.n1){background: rgba(var(--neg), .12);}" in html
    (top,) = re.findall(r"^Sequence (\d+),", repr(shown), re.M)[:1]
    weights = [np.abs(row).sum() for row in found.shares.tokens]
    assert int(top) == int(np.argmax(weights))
    assert 'class="t n5"' in html or 'class="t p5"' in html
    written = [t for t in found.update.response_token_ids[int(top)] if t > 1]
    assert found.policy.tokenizer.decode(written) in repr(shown).replace("⟨part⟩", "")
    assert "⟨" in repr(found.shares.show(most=1))
    assert len(re.findall("<details", found.update.show(most=2)._repr_html_())) == 2
    with pytest.raises(ss.StepscopeError, match="expected at least 1"):
        found.update.show(most=0)


def test_a_figure_that_is_not_there_is_answered_with_those_that_are(found: Any) -> None:
    with pytest.raises(ss.StepscopeError, match="no figure 'x'; there are change"):
        found.change.plot("x")
    with pytest.raises(ss.StepscopeError, match="nothing in it can be drawn"):
        notebook.figure(found.update._viewed())


def test_colours_follow_plotlys_template(found: Any) -> None:
    light = found.change.plot()
    before = pio.templates.default
    pio.templates.default = "plotly_dark"
    try:
        dark = found.change.plot()
    finally:
        pio.templates.default = before
    assert (light.layout.paper_bgcolor, dark.layout.paper_bgcolor) == ("#fdfdfc", "#16181b")
    assert "var(" not in light.to_json()
    assert [trace.y for trace in light.data] == [trace.y for trace in dark.data]
    assert light.layout.meta["caption"].startswith("Change of entropy per token")


def test_a_measurement_is_seen_as_its_artifacts_have_it(tiny_measurement: Path, tmp_path: Path) -> None:
    measured = ss.load_measurement(tiny_measurement)
    words = plain(measured._repr_html_())
    for name in ("entropy_per_token", "mean_reward"):
        assert text.bare(measured.summary[name]) in words
        assert measured.to_pandas().loc[name, "value"] == measured.summary[name].value
    assert measured.change is not None
    bars = measured.plot("waterfall").data[0]
    change = measured.change.taken or measured.change.at(measured.change.lr)
    assert bars.x[-1] == pytest.approx(sum(bars.x[:-1]), rel=1e-3)
    assert np.sign(bars.x[-1]) == np.sign(change.true.value)
    kernel = measured.kernel_frame("update_raw")
    matrices = measured.kernel_matrices("update_raw")
    assert matrices is not None
    assert kernel is not None
    assert (kernel.to_numpy() == matrices["update_raw"]).all()
    with pytest.raises(ss.StepscopeError, match="no kernel 'x', it has"):
        measured.kernel_frame("x")
    assert isinstance(measured, Readable)
    assert "⟨end⟩" in repr(measured.show())
    for name in ("step", "noise", "criteria", "pareto", "kernel"):
        part = getattr(measured, name)
        assert isinstance(part, Plotted), name
        assert part.plot().data
        assert len(part.to_pandas())
    page = ss.show_report(tiny_measurement)
    assert 'sandbox="allow-scripts allow-downloads"' in page._repr_html_()
    assert repr(page) == str(tiny_measurement / "report.html")
    assert len(ss.show_report(tiny_measurement, embed=False)._repr_html_()) < 400
    with pytest.raises(ss.StepscopeError, match="nothing to report"):
        ss.show_report(tmp_path)


def test_estimates_become_columns() -> None:
    estimate = Estimate(1.0, 0.5, 9, "nats", "by hand", low=0.0, high=2.0)
    first = {"name": "a", "x": estimate, "by": {"k": estimate}, "list": [1, 2]}
    table = frame([first, {"name": "b", "x": None}])
    assert table.x.tolist()[0] == 1.0
    columns = ["x_stderr", "x_low", "x_high", "x_unit", "x_n"]
    assert table.loc[0, columns].tolist() == [0.5, 0.0, 2.0, "nats", 9]
    assert table.by_k_high[0] == 2.0
    assert "list" not in table
    assert table.x.isna().tolist() == [False, True]


def test_a_notebook_shows_a_bar_below_the_cell() -> None:
    code = (
        "from stepscope.console import bar, bar_shown, in_notebook\n"
        "assert in_notebook() and bar_shown()\n"
        "sum(bar(range(3), 'adding up'))"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(book, timeout=120, kernel_name="python3")
    seen: list[Any] = []
    handle = client.process_message

    def watched(message: Any, *place: Any) -> Any:
        seen.append(message["content"])
        return handle(message, *place)

    client.process_message = watched  # type: ignore[method-assign]
    client.execute()
    assert "adding up" in str(seen)
    assert book.cells[0].outputs[-1]["data"]["text/plain"] == "3"


@pytest.mark.parametrize("path", sorted(GALLERY.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_gallery_is_stored_with_what_it_shows_and_without_plotly(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 300_000
    kinds = {kind for cell in code for out in cell.outputs for kind in out.get("data", {})}
    assert {"text/html", "application/vnd.plotly.v1+json"} <= kinds
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert "<script" not in path.read_text()


def test_explain_is_the_command_as_a_function(checkpoint: Path, tmp_path: Path) -> None:
    quick = ["update.num_prompts=8", "update.group_size=4", "probe.num_prompts=24", "lrs=[1e-5]"]
    quick += ["second_order=false", "baseline=none", "own_prompts=false"]
    answer = ss.explain(checkpoint, out=tmp_path / "why", overrides=quick)
    assert answer.sentence.startswith("At its own learning rate")
    assert answer.page.is_file()
    assert answer.waterfall is not None
    parts = answer.to_pandas()
    assert parts.name.tolist()[:2] == ["momentum", "weight decay"]
    assert parts.value.sum() == pytest.approx(answer.waterfall.change.value, rel=1e-9)
    assert answer.sentence in unescape(plain(answer._repr_html_())).replace("\u00a0", " ")
    assert "What the change is made of" in repr(answer)
    assert list(answer.plot().data[0].x[:-1]) == pytest.approx(
        list(parts.value / 10.0 ** _power(answer)), rel=1e-3, abs=1e-3
    )
    assert answer.show(most=1).html.count("<details") == 1
    again = ss.explain(checkpoint, out=tmp_path / "why", overrides=quick)
    assert again.sentence == answer.sentence


def _power(answer: Any) -> int:
    return int(answer.answer.unit.exponent)
