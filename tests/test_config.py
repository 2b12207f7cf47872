"""Configurations: strict reading, overrides, and errors that name every wrong key at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from stepscope.config import (
    STAGES,
    EvalConfig,
    MeasureConfig,
    StudyConfig,
    TrainConfig,
    build_config,
    dump_config,
    load_config,
)
from stepscope.errors import ConfigError
from stepscope.pipeline.preset import demo_config

ROOT = Path(__file__).parents[1]


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def measure(*overrides, path=None):
    return load_config(MeasureConfig, path, ["checkpoint=c", "out=o", *overrides])


def test_defaults_are_those_of_the_design():
    config = measure()
    assert (config.update.num_prompts, config.update.group_size, config.update.seed) == (16, 8, 0)
    assert (config.probe.num_prompts, config.probe.group_size, config.probe.seed) == (256, 1, 1)
    assert (config.update.split, config.probe.split) == ("train", "test")
    assert config.lrs is None
    assert config.stages == list(STAGES)
    assert config.loss.given() == {}


def test_every_wrong_key_is_named_at_once_with_its_path_and_a_suggestion(tmp_path):
    path = write(
        tmp_path,
        "modle: {source: tiny}\n"
        "rl: {stepz: 3, temperature: hot, optimizer: {lr: -1}}\nsft: {batch_size: 2.5}\n",
    )
    message = refused(TrainConfig, path)
    assert message.startswith(f"{path}: 5 wrong settings: ")
    assert "modle: unknown key (did you mean model?)" in message
    assert "rl.stepz: unknown key (did you mean rl.steps?)" in message
    assert "rl.temperature: expected number, got 'hot'" in message
    assert "rl.optimizer.lr: expected greater than 0, got -1" in message
    assert "sft.batch_size: expected integer, got 2.5" in message


def test_a_key_in_the_wrong_section_is_shown_where_it_belongs():
    assert "group_size: unknown key (did you mean rl.group_size?)" in refused(
        TrainConfig, None, ["group_size=4"]
    )


def test_wrong_override_paths_are_reported_like_wrong_keys():
    message = refused(
        MeasureConfig, None, ["checkpoint=c", "out=o", "probe.num_promts=3", "precison=float64"]
    )
    assert "probe.num_promts: unknown key (did you mean probe.num_prompts?)" in message
    assert "precison: unknown key (did you mean precision?)" in message


def test_missing_keys_are_named():
    message = refused(MeasureConfig)
    assert "checkpoint: missing" in message
    assert "out: missing" in message


def test_choices_are_listed():
    message = refused(MeasureConfig, None, ["checkpoint=c", "out=o", "precision=float23"])
    assert "precision: expected 'float32', 'float64' or 'bfloat16', got 'float23'" in message
    message = refused(MeasureConfig, None, ["checkpoint=c", "out=o", "stages=[step,chnage]"])
    assert "stages[1]: expected 'rollouts', 'step'" in message


def test_types_are_strict():
    for wrong in ("update.seed='1'", "update.num_prompts=true", "second_order=1", "lrs=1e-5"):
        key = wrong.partition("=")[0]
        assert f"{key}: expected" in refused(MeasureConfig, None, ["checkpoint=c", "out=o", wrong])


def test_numbers_in_exponent_notation_are_numbers(tmp_path):
    path = write(tmp_path, "lrs: [1e-5, 2.5e-6, 1E-4, 1]\nupdate: {seed: 12}\n")
    config = measure(path=path)
    assert config.lrs == [1e-5, 2.5e-6, 1e-4, 1.0]
    assert measure("lrs=[1e-9]").lrs == [1e-9]
    assert measure("task=1e5x").task == "1e5x"


def test_overrides_win_over_values_and_values_over_the_file(tmp_path):
    path = write(tmp_path, "checkpoint: a\nout: a\ntask: a\nprobe: {num_prompts: 7}\n")
    config = load_config(
        MeasureConfig, path, ["task=c"], {"out": "b", "task": "b", "precision": None, "probe.seed": 9}
    )
    assert (config.checkpoint, config.out, config.task) == ("a", "b", "c")
    assert (config.probe.num_prompts, config.probe.seed) == (7, 9)


def test_a_section_can_be_switched_off_but_not_both():
    assert load_config(TrainConfig, None, ["sft=null"]).sft is None
    assert "nothing to train" in refused(TrainConfig, None, ["sft=null", "rl=null"])


def test_nested_optional_section_reports_clean_paths():
    message = refused(TrainConfig, None, ["model.lora.rank=3", "model.lora.targets=3"])
    assert (
        "model.lora.rank: unknown key (did you mean" in message
        or "model.lora.rank: unknown key (known" in message
    )
    assert "model.lora.targets: expected" in message
    assert "LoraConfig" not in message


TEXTS = [
    "{question}", "[1]", "*", "&a", "!x", "# 1", "- a", "a: b", "5", "1e-3", "true", "no", "%", "@x", "`x`",
    "it's", "a #b", "2024-05-17", "Q: {question}\nA:", "null x", "=", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_field_of_text_takes_the_text_as_it_is(text):
    changed = measure(f"loss.prompt_template={text}", f"out=runs/{text}", f"update.file={text}")
    assert changed.loss.prompt_template == changed.update.file == (text or None)
    assert changed.out == f"runs/{text}"
    trained = load_config(TrainConfig, None, [f"template={text}", f"task=jsonl:{text}"])
    assert (trained.template, trained.task) == (text or None, f"jsonl:{text}")


def test_quotes_and_null_are_read_as_yaml():
    changed = measure('loss.prefill="<think>\\n"', "loss.prompt_template='{question}'", "task=null")
    assert changed.loss.prefill == "<think>\n"
    assert changed.loss.prompt_template == "{question}"
    assert changed.task is None
    changed = measure("loss.chat_template_kwargs={enable_thinking: false}", "lrs=[1e-6, 2]")
    assert changed.loss.chat_template_kwargs == {"enable_thinking": False}
    assert changed.lrs == [1e-6, 2.0]


def test_a_text_that_yaml_reads_as_something_else_is_to_be_quoted(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("template: {question}\n")
    message = refused(TrainConfig, file)
    assert "template: expected string, got a section; put the text in quotes" in message


@pytest.mark.parametrize("override", ["steps", "rl..steps=3", "=3", "rl.steps-x=1"])
def test_malformed_overrides_are_refused(override):
    assert "is not an override" in refused(TrainConfig, None, [override])


def test_override_through_a_value_is_refused():
    assert "task is the value 'x', not a section" in refused(TrainConfig, None, ["task=x", "task.name=y"])


def test_unreadable_files_are_refused(tmp_path):
    assert "no such configuration file" in refused(TrainConfig, tmp_path / "none.yaml")
    assert "not valid YAML" in refused(TrainConfig, write(tmp_path, "a: [1, 2"))
    assert "got a list" in refused(TrainConfig, write(tmp_path, "- 1\n"))
    assert "appears twice" in refused(TrainConfig, write(tmp_path, "seed: 1\nseed: 2\n"))
    assert "not valid YAML" in refused(
        TrainConfig, write(tmp_path, "a: !!python/object/apply:os.getcwd []\n")
    )
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a UTF-8 text file" in refused(TrainConfig, tmp_path / "binary.yaml")


def test_empty_file_means_defaults(tmp_path):
    assert load_config(TrainConfig, write(tmp_path, "# nothing\n")) == TrainConfig()


def test_configurations_are_frozen():
    with pytest.raises(ValidationError):
        measure().out = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cls", "overrides"),
    [
        (TrainConfig, ["model.lora.r=4", "rl.optimizer.lr=3e-7"]),
        (MeasureConfig, ["checkpoint=c", "out=o", "lrs=[1e-7,1e-6]", "loss.temperature=0.7"]),
        (EvalConfig, ["source=c", "ks=[1,4]"]),
        (StudyConfig, ["checkpoints=[a,b]", "out=o", "settings={x: {probe.num_prompts: 3}, y: {}}"]),
    ],
)
def test_resolved_configuration_replays(tmp_path, cls, overrides):
    config = load_config(cls, None, overrides)
    path = write(tmp_path, dump_config(config))
    assert load_config(cls, path) == config
    assert build_config(cls, yaml.safe_load(path.read_text())) == config
    assert "null" not in path.read_text()


def test_batches_must_differ_and_rates_be_positive():
    assert "same file" in refused(
        MeasureConfig, None, ["checkpoint=c", "out=o", "update.file=x", "probe.file=x"]
    )
    assert "lrs: learning rates must be greater than 0" in refused(
        MeasureConfig, None, ["checkpoint=c", "out=o", "lrs=[1e-5,-1e-5]"]
    )
    assert "each quantity may be named once" in refused(
        MeasureConfig, None, ["checkpoint=c", "out=o", "quantities=[entropy,entropy]"]
    )
    assert "update.group_size: expected greater than or equal to 2, got 1" in refused(
        MeasureConfig, None, ["checkpoint=c", "out=o", "update.group_size=1"]
    )


def test_pass_at_k_needs_enough_samples():
    asked = ["source=c", "samples_per_prompt=4", "ks=[1,8]"]
    assert "samples_per_prompt = 4" in refused(EvalConfig, None, asked)
    assert load_config(EvalConfig, None, asked[:2]).ks == [1, 4]
    assert load_config(EvalConfig, None, [*asked[:1], "samples_per_prompt=1"]).ks == [1]


def test_a_study_needs_the_change():
    assert "needs the stages step, change too" in refused(
        StudyConfig, None, ["checkpoints=[a]", "out=o", "stages=[rollouts]"]
    )


def test_study_settings_become_folder_names():
    assert "folder names" in refused(StudyConfig, None, ["checkpoints=[a]", "out=o", "settings={a/b: {}}"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_in_the_tree_is_valid(path):
    data = yaml.safe_load(path.read_text())
    if "checkpoints" in data:
        load_config(StudyConfig, path)
    elif {"update", "probe", "loss", "lrs"} & set(data):
        load_config(MeasureConfig, path, ["checkpoint=c", "out=o"])
    else:
        load_config(TrainConfig, path)


def test_the_demo_is_valid_and_packaged(tmp_path):
    config = demo_config(tmp_path / "demo", ["train.rl.steps=2", "measure.precision=float64"])
    assert config.train.out == str(tmp_path / "demo")
    assert config.train.rl is not None
    assert (config.train.rl.steps, config.measure.precision) == (2, "float64")
