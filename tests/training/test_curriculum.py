"""Draws by running pass rate, and their state in checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import DigitTask, digit_config, log_of, reinforced
from safetensors.torch import load_file

from stepscope.config import CurriculumConfig
from stepscope.errors import CheckpointError, ConfigError
from stepscope.training.shaping.curriculum import CURRICULUM_FILE, Curriculum

CONFIG = CurriculumConfig(hard=1.0, medium=2.0, easy=1.0, hard_below=0.25, easy_above=0.75, decay=0.5)


def test_rates_are_exponential_averages_of_groups() -> None:
    curriculum = Curriculum(CONFIG, ["a", "b", "c"])
    curriculum.observe([(0, True), (1, False), (0, False), (1, False)])
    np.testing.assert_array_equal(curriculum.rates, [0.5, 0.0, np.nan])
    curriculum.observe([(0, True)] * 4)
    np.testing.assert_array_equal(curriculum.rates, [0.75, 0.0, np.nan])
    assert curriculum.buckets().tolist() == [1, 0, 1]


def test_a_bucket_has_its_share_of_the_draws() -> None:
    """Rates 0, 0, 0.25, 0.5, 1: two hard, two medium (bounds count as medium), one easy."""
    curriculum = Curriculum(CONFIG, list("abcde"))
    curriculum.rates[:] = [0.0, 0.0, 0.25, 0.5, 1.0]
    np.testing.assert_allclose(curriculum.probabilities(), [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4])
    np.testing.assert_allclose(curriculum.probabilities({4}), [1 / 6, 1 / 6, 1 / 3, 1 / 3, 0])
    random = np.random.default_rng(0)
    drawn = np.bincount([int(curriculum.draw(1, random)[0]) for _ in range(1000)], minlength=5) / 1000
    np.testing.assert_allclose(drawn, curriculum.probabilities(), atol=0.05)


def test_draws_are_different_prompts_and_all_there_are() -> None:
    curriculum = Curriculum(CONFIG, list("abcde"))
    random = np.random.default_rng(0)
    assert sorted(curriculum.draw(5, random)) == [0, 1, 2, 3, 4]
    assert sorted(curriculum.draw(9, random, exclude={1, 3})) == [0, 2, 4]
    assert curriculum.draw(2, random, exclude=set(range(5))).size == 0


def test_rates_survive_a_file_bit_for_bit(tmp_path: Path) -> None:
    curriculum = Curriculum(CONFIG, list("abc"))
    curriculum.rates[:2] = [1 / 3, 0.1 + 0.2]
    curriculum.save(tmp_path)
    again = Curriculum(CONFIG, list("cab"))
    again.restore(tmp_path)
    np.testing.assert_array_equal(again.rates, [np.nan, 1 / 3, 0.1 + 0.2])
    with pytest.raises(CheckpointError, match=r"pass rate of 'a', a prompt that the task does not ask"):
        Curriculum(CONFIG, list("bc")).restore(tmp_path)
    (tmp_path / CURRICULUM_FILE).write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        curriculum.restore(tmp_path)


def test_buckets_must_not_overlap() -> None:
    with pytest.raises(ConfigError, match=r"hard_below 0.9 is above easy_above 0.8"):
        digit_config(curriculum={"hard_below": 0.9})


def test_training_asks_the_prompts_of_the_heavy_bucket(tmp_path: Path) -> None:
    """Prompts count as hard until they are asked; those that are solved then are not asked again."""
    task = DigitTask(num_dead=16)
    config = digit_config(
        steps=4, save_every=4, max_resample=0, curriculum={"hard": 1e6, "unseen": 0.0, "decay": 0.0}
    )
    last = reinforced(config, tmp_path, task)
    assert all(entry["curriculum_hard"] == 1.0 for entry in log_of(last))
    rates = json.loads((last / CURRICULUM_FILE).read_text())
    assert set(rates.values()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert max(rates.values()) > 0.2
    assert all(rate == 0 for name, rate in rates.items() if int(name.rpartition("/")[2]) < 16)


def test_an_interrupted_curriculum_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    """With two updates on each batch, replaced groups, and a bonus whose weight adapts."""
    config = digit_config(
        num_iterations=2,
        steps=4,
        curriculum={"decay": 0.3, "hard_below": 0.1, "easy_above": 0.3},
        objective={"name": "entropy_bonus", "coefficient": 0.01, "target": 9.0},
    )
    task = DigitTask(num_dead=16)
    once = reinforced(config, tmp_path / "once", task)
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-4")
    again = reinforced(config, tmp_path / "again", task, resume=tmp_path / "again/checkpoints/step-2")
    first, second = (load_file(folder / "model.safetensors") for folder in (once, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in (CURRICULUM_FILE, "entropy_ctrl_state.json", "stepscope.json"):
        assert (once / name).read_bytes() == (again / name).read_bytes()
    earlier = json.loads((once.with_name("step-2") / CURRICULUM_FILE).read_text())
    assert earlier != json.loads((once / CURRICULUM_FILE).read_text())
