"""Files of unknown origin: whatever is in them, a command is done or ends with one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hostile import FILES, ODD, damage, ends_well, few
from stepscope import bounded
from stepscope.config import (
    EvalConfig,
    MeasureConfig,
    Section,
    StudyConfig,
    TrainConfig,
    build_config,
    dump_config,
)
from stepscope.config.loading import apply_overrides
from stepscope.errors import CheckpointError, ConfigError, StepscopeError, printable
from stepscope.tasks import load_task
from stepscope.yaml_text import parse_yaml

sys.path.insert(0, str(Path(__file__).parent / "report"))
from folders import hostile, make_run

EVAL = ["num_prompts=2", "samples_per_prompt=1", "ks=[1]"]


def few_and_many(small: int, large: int) -> Callable[..., Any]:
    """A bounded number of examples in every run of the tests, and a large one among the long checks."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(small, id="few"), pytest.param(large, id="many", marks=pytest.mark.slow)]
    )


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return fresh(checkpoint, tmp_path / "step-4")


def fresh(source: Path, target: Path) -> Path:
    """A copy in place of the one before, without the digests that would refuse every change."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / "manifest.json").unlink(missing_ok=True)
    return target


def refusal(make: Callable[[], object]) -> str:
    """The line for what ``make`` refuses, or "" where it refuses nothing."""
    try:
        made = make()
    except StepscopeError as error:
        return printable(str(error))
    if isinstance(made, Section):
        assert dump_config(made)
    return ""


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return change


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def optimizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "optimizer.pt")

    return apply


def packed(folder: Path) -> None:
    """The optimizer's file compressed, with 128 megabytes of zeros beside the state."""
    with zipfile.ZipFile(folder / "optimizer.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", bytes(2**27))


def misindexed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1, 2]}))


TEMPLATE = "{% set ns = namespace(n=0) %}{{ messages[0]['content'].no_such.attribute }}"

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million layers": (edit("config.json", num_hidden_layers=10**6), "layers, and the files hold"),
    "10^30 layers": (edit("config.json", num_hidden_layers=10**30), "layers, and the files hold"),
    "a vocabulary of 10^9": (edit("config.json", vocab_size=10**9), "parameters, and the files hold"),
    "a hidden size below 0": (edit("config.json", hidden_size=-8), "config.json|cannot be loaded|sound"),
    "heads as text": (edit("config.json", num_attention_heads="two"), "cannot be loaded|sound"),
    "no heads": (edit("config.json", num_attention_heads=0), "cannot be loaded|sound"),
    "rope as a list": (edit("config.json", rope_parameters=[1]), "cannot be loaded|sound"),
    "a model type as a list": (edit("config.json", model_type=["qwen2"]), "cannot be loaded|sound"),
    "a deep config": (write("config.json", b'{"a":' * 100_000), "cannot be loaded|sound"),
    "a config of digits": (write("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"), "loaded|sound"),
    "an index of a list": (misindexed, "cannot be loaded|sound"),
    "a tokenizer of nothing": (write("tokenizer.json", b"null"), "tokenizer|sound"),
    "a tokenizer without model": (edit("tokenizer.json", model={}), "tokenizer|sound"),
    "added tokens out of order": (
        edit("tokenizer.json", added_tokens=[{"id": -1, "content": 3}]),
        "tokenizer|sound",
    ),
    "generation of a list": (write("generation_config.json", b"[1]"), "cannot be loaded|sound"),
    "an end that is no token": (
        write("generation_config.json", b'{"eos_token_id": 0.5}'),
        "eos_token_id|sound",
    ),
    "an adapter of a list": (write("adapter_config.json", b"[1]"), "adapter_config.json"),
    "an adapter of nothing": (edit("adapter_config.json", base_model_name_or_path={}), "adapter_config.json"),
    "no temperature": (edit("stepscope.json", temperature=0.0), "temperature"),
    "no length": (edit("stepscope.json", max_response_tokens=-1), "max_response_tokens"),
    "deep settings": (write("stepscope.json", b"[" * 100_000), "stepscope.json"),
    "endless steps": (write("trainer_state.json", b'{"global_step": Infinity}'), "trainer_state.json"),
    "groups as text": (optimizer(lambda o: o.update(param_groups="x")), "optimizer.pt|sound"),
    "no groups": (optimizer(lambda o: o.update(param_groups=[])), "optimizer.pt|sound"),
    "a moment as text": (optimizer(lambda o: o["state"][0].update(exp_avg="x")), "optimizer.pt|sound"),
    "a state as a list": (optimizer(lambda o: o.update(state=[1])), "optimizer.pt|sound"),
    "a rate as a list": (optimizer(lambda o: o["param_groups"][0].update(lr=[1])), "lr"),
    "a packed optimizer": (packed, "bytes unpacked"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_is_one_line(case, copy, tmp_path):
    change, said = CASES[case]
    change(copy)
    code, line = ends_well("measure", copy, "--out", tmp_path / "out", "--stages", "rollouts")
    assert code == 2
    assert str(copy) in line
    assert any(part in line for part in said.split("|")), line
    assert ends_well("check", copy)[0] == 2


def test_a_template_that_fails_is_one_line(copy, tmp_path):
    edit("tokenizer_config.json", chat_template=TEMPLATE)(copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    asked = "loss.prompt_template=chat:{question}"
    code, line = ends_well("eval", copy, "--out", tmp_path / "e.parquet", *EVAL, asked)
    assert code == 2
    assert "template" in line
    assert ends_well("check", copy, asked)[0] in (0, 2)


def test_lengths_that_lie_in_a_gguf_file_are_one_line(checkpoint, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**62).to_bytes(8, "little") * 2)
    code, line = ends_well("measure", checkpoint, "--out", tmp_path / "out", f"reference={model}")
    assert code == 2
    assert "m.gguf" in line


@few_and_many(16, 2000)
def test_no_damage_to_a_checkpoint_gives_a_traceback(checkpoint, tmp_path, examples):
    names = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "stepscope.json",
    ]
    names += ["trainer_state.json", "model.safetensors", "optimizer.pt"]

    @few(examples)
    @given(name=st.sampled_from(names), data=st.data())
    def hurt(name: str, data: st.DataObject) -> None:
        folder = fresh(checkpoint, tmp_path / "step-4")
        damage(folder / name, data.draw)
        ends_well("check", folder)
        shutil.rmtree(tmp_path / "e_parts", ignore_errors=True)
        for file in tmp_path.glob("e*.*"):
            file.unlink()
        ends_well("eval", folder, "--out", tmp_path / "e.parquet", *EVAL)

    hurt()


@few_and_many(30, 3000)
def test_no_damage_to_artifacts_gives_a_traceback(tiny_measurement, tmp_path, examples):
    measured = hostile(fresh(tiny_measurement, tmp_path / "measured"))
    sources = [make_run(tmp_path / "run", measured), measured]
    kinds = (".json", ".parquet", ".safetensors", ".yaml")
    files = [(s, f.relative_to(s)) for s in sources for f in sorted(s.rglob("*")) if f.suffix in kinds]

    @few(examples)
    @given(which=st.sampled_from(files), data=st.data())
    def hurt(which: tuple[Path, Path], data: st.DataObject) -> None:
        folder = fresh(which[0], tmp_path / "damaged")
        damage(folder / which[1], data.draw)
        ends_well("report", folder)

    hurt()


def _paths(kind: type[Section]) -> list[str]:
    """Dotted names of the settings of a configuration, two levels deep."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += [f"{name}.{n}" for n in inner.model_fields]
    return found


KINDS = (TrainConfig, MeasureConfig, EvalConfig, StudyConfig)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)


@few_and_many(150, 100_000)
def test_no_setting_gives_a_traceback(examples):
    @few(examples)
    @given(kind=st.sampled_from(KINDS), data=st.data())
    def give(kind: type[Section], data: st.DataObject) -> None:
        path, value = data.draw(st.sampled_from(_paths(kind))), data.draw(VALUES)
        text = data.draw(st.sampled_from([str, repr, json.dumps, yaml.safe_dump]))
        try:
            shown = text(value)
        except (ValueError, UnicodeError, yaml.YAMLError):
            shown = str(value)
        given = f"{path}={shown}"
        assert len(refusal(lambda: build_config(kind, apply_overrides(kind, {}, [given])))) < 2200

    give()


@few_and_many(300, 100_000)
def test_no_text_gives_a_traceback_as_yaml(examples):
    signs = st.text(alphabet="[]{}:-?&*!|>'\"%@`#,~ \n\tab01.e<\x00\ud800\xff", max_size=40)

    @few(examples)
    @given(signs)
    def read(text: str) -> None:
        assert len(refusal(lambda: parse_yaml(text, "text"))) < 2200

    read()


@pytest.mark.parametrize(
    "text", ["1: 2", "? [a]\n: 1", "a: &x [*x]", "[" * 3000, "a: " + "9" * 5000, "a: 2020-99-99"]
)
def test_yaml_that_is_no_configuration(text):
    with pytest.raises(ConfigError):
        parse_yaml(text, "text")


def test_a_character_escaped_in_halves_is_one():
    assert parse_yaml('a: "\\ud83d\\ude00"', "text") == {"a": "\N{GRINNING FACE}"}
    with pytest.raises(ConfigError, match="half a character"):
        parse_yaml('a: "\\ud83d"', "text")


def test_aliases_are_counted_each_time():
    lines = [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)]
    with pytest.raises(ConfigError, match="too many values"):
        parse_yaml("a: &a [1]\n" + "\n".join(lines), "text")
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "text")["b"] == {"x": 1, "y": 2}


def test_twenty_thousand_unknown_keys_are_twenty_and_a_count():
    with pytest.raises(ConfigError) as error:
        build_config(TrainConfig, {f"key{i}": 1 for i in range(20_000)})
    assert str(error.value).startswith("configuration: 20000 wrong settings: key0: unknown key")
    assert str(error.value).endswith("; and 19980 more")


def test_a_suggestion_is_of_the_same_section():
    for section in ("rl", "sft"):
        with pytest.raises(ConfigError, match=rf"did you mean {section}\.optimizer\.lr\?"):
            build_config(TrainConfig, {"task": "arithmetic", section: {"lr": 1e-5}})


@few_and_many(60, 20_000)
def test_no_task_file_gives_a_traceback(tmp_path, examples):
    rows = st.dictionaries(
        st.sampled_from(["prompt", "answer", "solution", "question", "split", "id"]), VALUES
    )
    file = tmp_path / "t.jsonl"

    @few(examples)
    @given(st.one_of(st.binary(max_size=60), st.sampled_from(FILES), st.lists(rows, min_size=1, max_size=3)))
    def load(content: bytes | list[dict[str, Any]]) -> None:
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content)).encode()
        file.write_bytes(content)
        assert len(refusal(lambda: load_task(f"jsonl:{file}"))) < 2200

    load()


def test_a_look_that_takes_too_long_is_given_up(checkpoint):
    """From a shell, where check is a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from stepscope.cli import main; main()",
            "check",
            checkpoint,
            "--time-limit",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "more than 1 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_reader_that_dies_is_one_line(tmp_path, monkeypatch, name):
    """The process is another program, one that dies as an interpreter does."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{name.removeprefix('SIG')} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(program))
    with pytest.raises(CheckpointError, match=f"died of {name}"):
        bounded.run_bounded(["check", "x"], seconds=60, what="x")
