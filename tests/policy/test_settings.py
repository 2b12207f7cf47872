from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepscope.errors import CheckpointError
from stepscope.policy.loss.settings import StepSettings


def test_saved_settings_come_back_equal(tmp_path: Path) -> None:
    settings = StepSettings(
        loss_type="grpo", max_prompt_tokens=12, beta=0.04, task="arithmetic", mask_truncated=True
    )
    settings.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stepscope.json"]
    assert StepSettings.load(tmp_path) == settings == StepSettings.load(tmp_path / "stepscope.json")


def test_all_wrong_keys_and_types_are_named_at_once(tmp_path: Path) -> None:
    StepSettings().save(tmp_path)
    data = json.loads((tmp_path / "stepscope.json").read_text()) | {
        "temprature": 1.0,
        "beta": "x",
        "group_size": True,
    }
    (tmp_path / "stepscope.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        StepSettings.load(tmp_path)
    message = str(caught.value)
    assert "temprature: Unexpected keyword argument, got 1.0" in message
    assert "beta: Input should be a valid number, got 'x'" in message
    assert "group_size: Input should be a valid integer, got True" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"loss_type": "grpo"}'])
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stepscope.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"stepscope\.json"):
        StepSettings.load(tmp_path)


def test_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        StepSettings.load(tmp_path / "absent.json")


def test_whole_numbers_are_fine_where_a_float_is_meant() -> None:
    assert StepSettings.from_plain({"temperature": 1}, where="here").temperature == 1.0


@pytest.mark.parametrize("limited", [False, True])
def test_settings_of_checkpoints_from_before_losses_off_policy(tmp_path: Path, limited: bool) -> None:
    """The flag said whether a loss was known on policy only; where it was set, its parameters are missing."""
    StepSettings(beta=0.1).save(tmp_path)
    file = tmp_path / "stepscope.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"on_policy_only": limited}))
    if limited:
        with pytest.raises(CheckpointError, match="on_policy_only"):
            StepSettings.load(tmp_path)
    else:
        assert StepSettings.load(tmp_path) == StepSettings(beta=0.1)
