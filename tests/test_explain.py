"""``stepscope explain``: one command to the answer, in sizes that the time allows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import stepscope as ss
from stepscope import cli
from stepscope.config import MeasureConfig, build_config
from stepscope.pipeline import sizing
from stepscope.pipeline.explain import STAGES
from stepscope.pipeline.sizing import FEWEST, PASSES, RESERVE, Pace, Speed, fitting, pace, within_task
from stepscope.pipeline.stages.session import Session
from stepscope.report.terminal import answer_of, printed
from stepscope.runs import RunFolder

QUICK = (
    *("update.num_prompts=8", "update.group_size=4", "probe.num_prompts=24"),
    *("lrs=[1e-5]", "second_order=false", "baseline=none", "own_prompts=false"),
)


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, ["explain", *map(str, args)])


@pytest.fixture(scope="module")
def explained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("explained") / "why"
    return out, run(checkpoint, "--out", out, *QUICK)


def test_the_answer_is_printed_and_the_page_is_there(explained: tuple[Path, Any]) -> None:
    out, found = explained
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("At its own learning rate")
    for words in (
        "What the change is made of",
        "momentum",
        "weight decay",
        "the whole change",
        "not resolved from zero",
    ):
        assert words in found.stdout
    assert found.stdout.endswith(f"page: {out / 'report.html'}\n")
    token = answer_of(out).lowered[0]
    assert f"[[{token.token}]]" in found.stdout, "no colour marks it where this is no terminal"
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # rich then takes any file for a terminal
        printed(answer_of(out), out / "report.html", file=shown)
    assert "[[" not in shown.getvalue()
    assert "\x1b[" in shown.getvalue()
    assert (out / "report.html").is_file()
    assert "8 x 4 responses make the step, 24 x 1 measure it: about" in found.stderr


def test_a_second_call_measures_nothing_and_its_object_is_the_artifacts(
    explained: tuple[Path, Any], checkpoint: Path
) -> None:
    out, _ = explained
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix in (".json", ".parquet")}
    found = run(checkpoint, "--out", out, "--json", *QUICK[3:])
    assert found.exit_code == 0, found.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    record, measured = json.loads(found.stdout), ss.load_measurement(out)
    change = measured.change
    assert change is not None
    (point,) = [p for p in change.points if p.lr == pytest.approx(change.lr)]
    assert record["change"]["value"] == (change.taken or point).true.value
    assert record["before"]["value"] == change.value.value
    assert sum(part["value"] for part in record["parts"]) == pytest.approx(
        record["change"]["value"], rel=1e-9
    )
    assert {"momentum", "weight decay", "rest"} <= {part["name"] for part in record["parts"]}
    tokens = measured.influence_tokens
    assert tokens is not None
    table = tokens.to_pandas()
    ranked = table[table.through == ("optimizer" if "optimizer" in set(table.through) else "fixed")]
    of = ranked.set_index(["sequence_id", "position"]).influence
    for sign, side in ((-1, "lowered"), (1, "raised")):
        values = [token["value"] for token in record[side]]
        assert values == sorted(values, reverse=sign > 0)
        for token in record[side]:
            places = [(place["sequence"], place["position"]) for place in token["places"]]
            assert token["value"] == pytest.approx(change.lr * sum(of[place] for place in places), rel=1e-9)
    assert record["page"] == str(out / "report.html")


def test_the_time_left_is_said_after_a_stage(explained: tuple[Path, Any]) -> None:
    lines = [line for line in explained[1].stderr.splitlines() if line.startswith(("rollouts:", "report:"))]
    assert len(lines) == 2
    assert "left" not in lines[1]


def test_time_left_goes_by_what_the_stages_took() -> None:
    """Twice as slow as expected: what is left is twice as long, too."""
    config = build_config(MeasureConfig, {"checkpoint": "c", "out": "o"})
    found = pace(config, Speed(sampled=0.01, passed=0.02), STAGES)
    responses = config.update.num_prompts * config.update.group_size + config.probe.num_prompts
    assert found.expected["rollouts"] == pytest.approx((0.01 + 0.02 * PASSES["rollouts"]) * responses)
    assert found.expected["change"] == pytest.approx(0.02 * PASSES["change"] * responses)
    spent = found.expected["rollouts"] + found.expected["step"] + found.expected["change"]
    late = Pace(found.expected, begin=found.begin - 2 * spent)
    rest = found.expected["influence"] + found.expected["report"]
    assert late.left("change") == pytest.approx(2 * rest, rel=1e-3)
    assert "left" in late.words("change")
    assert late.left("report") == 0
    assert late.words("report") == ""


def test_quick_is_an_explanation_that_ends_like_a_measurement(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    command = ["measure", checkpoint, "--quick", "--out", out, *QUICK]
    found = CliRunner().invoke(cli.app, list(map(str, command)))
    assert found.exit_code == 0, found.output
    assert "measure --quick: 8 x 4 responses make the step, 24 x 1 measure it" in found.stderr
    assert found.stderr.splitlines()[-1] == f"measure: {out / 'report.html'}"
    assert "At its own learning rate" in found.stderr
    done = yaml.safe_load((out / "config.yaml").read_text())
    assert done["stages"] == list(STAGES)
    again = CliRunner().invoke(cli.app, list(map(str, command)))
    assert again.exit_code == 2
    assert "add --resume" in again.stderr
    both = CliRunner().invoke(cli.app, ["measure", str(checkpoint), "--quick", "--stages", "step"])
    assert both.exit_code == 2
    assert "--quick chooses the stages" in both.stderr


def test_a_long_measurement_says_so_before_it_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shorter hour, so that the trial is a real one; nothing is tried where none could be so slow."""
    command = ["measure", str(checkpoint), "--stages", "rollouts,step", *QUICK]
    monkeypatch.setattr(sizing, "LONG", 1e-3)
    monkeypatch.setattr(sizing, "least_speed", lambda device: 1.0)
    found = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "long")])
    assert found.exit_code == 0, found.output
    lines = found.stderr.splitlines()
    (warned,) = [i for i, line in enumerate(lines) if "warning: this will take about" in line]
    assert "56 responses of up to 24 tokens" in lines[warned]
    assert "--quick answers first" in lines[warned]
    assert warned < next(i for i, line in enumerate(lines) if line.startswith("rollouts:"))
    monkeypatch.setattr(sizing, "least_speed", lambda device: 1e18)
    monkeypatch.setattr(sizing, "trial", lambda session: pytest.fail("nothing is to be tried"))
    assert CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "short")]).exit_code == 0
    for name in ("update_tokens.parquet", "probe_tokens.parquet", "direction.safetensors"):
        assert (tmp_path / "long" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()


def test_a_configuration_file_says_where_it_goes(
    explained: tuple[Path, Any], checkpoint: Path, tmp_path: Path
) -> None:
    out, _ = explained
    file = tmp_path / "why.yaml"
    file.write_text(f"out: {out}\nsecond_order: false\nbaseline: none\nown_prompts: false\nlrs: [1e-5]\n")
    found = run(checkpoint, "--config", file, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["page"] == str(out / "report.html")


def test_another_checkpoint_is_not_explained_in_the_same_folder(
    explained: tuple[Path, Any], checkpoint: Path
) -> None:
    out, _ = explained
    found = run(checkpoint.parent / "step-2", "--out", out)
    assert found.exit_code == 2
    assert "give another --out" in found.stderr


def test_what_cannot_be_is_refused_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    assert run(checkpoint, "--minutes", "0").exit_code == 2
    found = run(tmp_path / "nothing", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert not (tmp_path / "out").exists()


def sizes(left: float, seconds: float, fixed: frozenset[str] = frozenset()) -> tuple[int, int]:
    config = build_config(MeasureConfig, {"checkpoint": "c", "out": "o"})
    found = fitting(config, seconds, left, fixed)
    assert found.update.group_size == config.update.group_size
    return found.update.num_prompts, found.probe.num_prompts


def test_batches_are_sized_for_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config(MeasureConfig, {"checkpoint": "c", "out": "o"})
    whole = (config.update.num_prompts, config.probe.num_prompts)
    total = whole[0] * config.update.group_size + whole[1]
    assert sizes(total / RESERVE, 1.0) == whole
    assert "smaller" not in capsys.readouterr().err
    half = sizes(total / RESERVE / 1.6, 1.0)
    assert half == (int(whole[0] / 1.6), int(whole[1] / 1.6))
    assert "smaller than the default, for the time" in capsys.readouterr().err
    update = frozenset({"update"})
    assert sizes(total / RESERVE / 1.6, 1.0, update)[0] == whole[0]
    assert sizes(60.0, 3600.0) == (FEWEST, FEWEST)
    said = capsys.readouterr().err
    assert "hours" in said
    assert "a sequence takes 3600.0 s here" in said


def test_batches_are_no_larger_than_a_file_of_prompts(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": n + 1}) + "\n" for n in range(60)))
    plain = {"checkpoint": str(checkpoint), "out": str(tmp_path / "run")}
    own = {"prompts": str(file), "reward": "builtins:len", "template": "{prompt}"}

    def prompts(fixed: frozenset[str] = frozenset(), **settings: Any) -> tuple[int, int]:
        config = build_config(MeasureConfig, plain | (settings if "task" in settings else own | settings))
        found = within_task(Session(config, RunFolder(tmp_path / "run")), fixed)
        return found.update.num_prompts, found.probe.num_prompts

    update, probe = prompts()
    assert update >= FEWEST
    assert probe >= FEWEST
    assert update + probe == 60
    assert prompts(update={"num_prompts": 10}, probe={"num_prompts": 20}) == (10, 20)
    assert prompts(frozenset({"probe"}), probe={"num_prompts": 55})[1] == 55
    assert prompts(task=f"jsonl:{file}") == (16, 8)  # this task holds 8 of 60 out, apart from the others
