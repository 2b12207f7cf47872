"""``stepscope export`` on a real small measurement, read back by Inspect where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stepscope as ss
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline.export import exported, run_export


def test_a_measurement_is_exported_with_the_numbers_of_its_files(tiny_measurement: Path) -> None:
    found = ss.load_measurement(tiny_measurement)
    update, probe = exported(tiny_measurement)
    assert (update.name, probe.name) == ("update", "probe")
    assert (len(update.samples), len(probe.samples)) == (len(found.update), len(found.probe))
    tokens = found.influence_tokens.to_pandas()
    sequences = found.influence_sequences.to_pandas()
    assert {"fixed", "optimizer"} == set(tokens.through)
    for i, sample in enumerate(update.samples):
        assert "".join(sample.tokens) == sample.response == found.update.responses[i]
        np.testing.assert_array_equal(sample.logprobs, found.update.logprobs[i])
        np.testing.assert_array_equal(sample.per_token["entropy"], found.update.entropies[i])
        assert sample.scores["reward"] == found.update.rewards[i]
        for way, through in (("entropy", "fixed"), ("entropy_optimizer", "optimizer")):
            own = tokens[
                (tokens.sequence_id == i) & (tokens.quantity == "entropy") & (tokens.through == through)
            ]
            np.testing.assert_array_equal(sample.per_token[f"influence_{way}"][own.position], own.influence)
            np.testing.assert_array_equal(sample.per_token[f"stderr_{way}"][own.position], own.stderr)
            (whole,) = sequences.influence[
                (sequences.sequence_id == i)
                & (sequences.quantity == "entropy")
                & (sequences.through == through)
            ]
            assert sample.scores[f"influence_{way}"] == whole
    assert update.figures["reward"]["mean"].value == pytest.approx(found.update.rewards.mean())
    assert "influence_entropy" not in probe.samples[0].scores


def test_inspect_reads_the_log_back(tiny_measurement: Path, tmp_path: Path) -> None:
    log = pytest.importorskip(
        "inspect_ai.log", reason="inspect_ai is not installed: make test-beside installs and tests it"
    )
    run_export(tiny_measurement, to="inspect", out=tmp_path)
    assert {Path(info.name).name for info in log.list_eval_logs(str(tmp_path))} == {
        "update.eval",
        "probe.eval",
    }
    for source in exported(tiny_measurement):
        found = log.read_eval_log(str(tmp_path / f"{source.name}.eval"))
        assert (found.status, found.eval.task) == ("success", source.task)
        assert found.eval.dataset.samples == len({s.prompt_id for s in source.samples})
        (reward, correct) = found.results.scores
        assert reward.metrics["mean"].value == source.figures["reward"]["mean"].value
        assert reward.metrics["stderr"].value == source.figures["reward"]["mean"].stderr
        assert correct.metrics["accuracy"].value == np.mean([s.correct for s in source.samples])
        epochs: dict[str, int] = {}
        read = {(sample.id, sample.epoch): sample for sample in found.samples}
        assert len(read) == len(source.samples)
        for sample in source.samples:
            epochs[sample.prompt_id] = epochs.get(sample.prompt_id, 0) + 1
            mine = read[sample.prompt_id, epochs[sample.prompt_id]]
            assert mine.input == sample.prompt
            assert mine.output.completion == sample.response
            assert mine.output.stop_reason == ("max_tokens" if sample.truncated else "stop")
            logprobs = mine.output.choices[0].logprobs.content
            assert [entry.token for entry in logprobs] == sample.tokens
            np.testing.assert_array_equal([entry.logprob for entry in logprobs], sample.logprobs)
            assert mine.scores["correct"].value == ("C" if sample.correct else "I")
            for name, value in sample.scores.items():
                np.testing.assert_equal(float(mine.scores[name].value), value)
            for name, values in sample.per_token.items():
                kept = np.array(mine.metadata["per_token"][name], dtype=np.float64)
                np.testing.assert_array_equal(kept, values)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--to: expected one of inspect, got 'html'"):
        run_export(tmp_path, to="html")
    with pytest.raises(RunFolderError, match="expected the folder of a measurement"):
        next(exported(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install it \(pip install 'stepscope\[inspect\]'"):
        run_export(tmp_path, to="inspect")
