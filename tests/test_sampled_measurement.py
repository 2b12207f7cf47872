"""Measurements and evaluations whose responses an engine draws, end to end from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cases
import stepscope as ss
from policy.engine_server import Engine, serving
from stepscope import cli
from stepscope.config import EvalConfig, MeasureConfig, build_config
from stepscope.errors import ConfigError

TASK = ["--task", "arithmetic:terms=2,digits=2,ops=+"]
QUICK = [
    *("update.num_prompts=4", "update.group_size=4", "probe.num_prompts=24", "probe.group_size=2"),
    *("batch_size=64", "lrs=[1e-5]", "second_order=false", "baseline=none", "own_prompts=false"),
]


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, args)))


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_another_temperature_and_truncation_are_shown_and_flagged(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    stages = ["--stages", "rollouts,step,change,influence,report"]
    found = run(
        *("measure", checkpoint, *TASK, "--out", out, *QUICK, *stages),
        *("sampler.temperature=1.3", "sampler.top_k=5"),
    )
    assert found.exit_code == 0, found.output
    assert "warning: probe batch: drawn at another temperature or truncated" in found.stderr
    measured = ss.load_measurement(out)
    assert measured.sampler is not None
    assert set(measured.sampler.batches) == {"update", "probe"}
    assert measured.sampler.settings["temperature"] == "1.3"
    probe = measured.probe
    assert probe is not None
    assert probe.kept_masses is not None
    lost = np.concatenate([-np.log(row) for row in probe.kept_masses]).mean()
    figures = summary(out)
    assert figures["sampler_mass_lost"]["value"] == pytest.approx(lost)
    assert lost > 0.001
    assert figures["sampler_kl_per_token"]["value"] > 0
    assert {"update_sampler_kl_per_token", "sampler_effective_share", "sampler_kl_per_seq"} <= set(figures)
    rest_on_it = [n for n in figures if n.startswith(("entropy_per", "change_", "influence_", "mean_length"))]
    assert len(rest_on_it) > 6
    for name in rest_on_it:
        assert not figures[name]["reliable"], name
        assert "drawn at another temperature" in figures[name]["reason"], name
    assert figures["share_momentum"]["reliable"]
    page = (out / "report.html").read_text()
    assert "Sampler against policy" in page
    assert "transformers (temperature 1.3, top_k 5)" in page
    again = run(
        *("measure", checkpoint, *TASK, "--out", out, "--resume", *QUICK, *stages),
        *("sampler.temperature=1.3", "sampler.top_k=5"),
    )
    assert "rollouts: done before" in again.stderr


def test_a_server_of_the_checkpoint_measures_as_the_policy_does(checkpoint: Path, tmp_path: Path) -> None:
    policy = ss.load_checkpoint(checkpoint)
    out = tmp_path / "m"
    with serving(Engine(policy.model, logprobs="raw")) as url:
        served = [f"sampler.url={url}", "sampler.engine=openai"]
        found = run(
            *("measure", checkpoint, *TASK, "--out", out, *QUICK, *served),
            *("--stages", "rollouts,step,change,report"),
        )
        assert found.exit_code == 0, found.output
        evaluated = run(
            *("eval", checkpoint, *TASK, "--out", tmp_path / "eval.parquet", "num_prompts=6"),
            *("samples_per_prompt=2", "ks=[1]", *served),
        )
        assert evaluated.exit_code == 0, evaluated.output
    figures = summary(out)
    assert figures["sampler_difference"]["value"] < 1e-4
    assert figures["entropy_per_token"]["reliable"]
    assert "sampler_mass_lost" not in figures
    batch = ss.load_measurement(out).update
    assert batch is not None
    assert batch.sampler_logprobs is not None
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    with serving(Engine(policy.model)) as url:
        refused = run(
            *("measure", checkpoint, *TASK, "--out", tmp_path / "n", *QUICK),
            *("sampler.engine=openai", f"sampler.url={url}", "--stages", "rollouts"),
        )
    assert refused.exit_code == 2
    assert "does not serve this policy" in refused.stderr
    assert "vllm serve" in refused.stderr
    assert not (tmp_path / "n").exists() or not (tmp_path / "n" / "update.parquet").exists()


def test_the_default_leaves_no_trace_but_its_name(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert (
        run("measure", checkpoint, *TASK, "--out", out, *QUICK, "--stages", "rollouts,report").exit_code == 0
    )
    report = ss.load_measurement(out).sampler
    assert report is not None
    assert (report.settings["engine"], dict(report.batches)) == ("transformers", {})
    assert not [name for name in summary(out) if "sampler" in name]
    assert "Sampler against policy</h" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (MeasureConfig, {"engine": "openai"}, "url is the address"),
        (MeasureConfig, {"url": "http://a"}, "url is the address"),
        (MeasureConfig, {"adapter": True}, "are vLLM's"),
        (MeasureConfig, {"top_p": 0.0}, "top_p"),
        (EvalConfig, {"top_p": 0.9}, "temperatures and top_ps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind: Any, keys: dict[str, Any], message: str) -> None:
    needed = {"source": "a"} if kind is EvalConfig else {"checkpoint": "a", "out": "b"}
    with pytest.raises(ConfigError, match=message):
        build_config(kind, {**needed, "sampler": keys})


def test_merged_weights_are_the_policys(tmp_path: Path) -> None:
    base = cases.model()
    base.save_pretrained(tmp_path / "base")
    adapted = cases.adapted(type(base).from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    cases.tokenizer().save_pretrained(tmp_path / "adapter")
    found = run("convert", tmp_path / "adapter", tmp_path / "merged", "--merged")
    assert found.exit_code == 0, found.output
    served = type(base).from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 9, 3]])
    torch.testing.assert_close(served(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    again = run("convert", tmp_path / "adapter", tmp_path / "merged", "--merged")
    assert again.exit_code == 2
    assert "is there already" in again.stderr
