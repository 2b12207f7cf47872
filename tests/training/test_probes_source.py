"""Probes that take prompts and rewards from the trainer they watch."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import stepscope as ss
from stepscope.results import read_table
from stepscope.tasks import Problem
from stepscope.trackers.texts import LOWERS, RAISES
from stepscope.training.probe.source import TrainerSource
from tracked import events_of, read, texts_of, wandb_history, wandb_offline

TASK = "arithmetic:terms=2,digits=1,ops=+"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}({{ mood }}): {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTIONS = [(a, b) for a in range(9) for b in range(9)]


def long(completions: list[Any], **_: Any) -> list[float]:
    """Length of the response in characters."""
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def tagged(completions: list[Any], tag: list[int], **_: Any) -> list[float | None]:
    """The column ``tag``; nothing for every third row. Draws random numbers and leaves logs."""
    random.random()
    _["log_metric"]("drawn", 1.0)
    return [None if t % 3 == 0 else float(t) for t in tag]


def make_trainer(
    model: Path, out: Path, *probes: TrainerCallback, rows: list[dict[str, Any]], **arguments: Any
) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "reward_weights": [1.0, 10.0],
    }
    evaluated = arguments.pop("eval_dataset", None)
    resumable = {"restore_callback_states_from_checkpoint": False}
    return GRPOTrainer(
        model=str(model),
        reward_funcs=[long, tagged],
        args=GRPOConfig(output_dir=str(out), **(settings | resumable | arguments)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=evaluated,
        callbacks=list(probes),
    )


def plain_rows() -> list[dict[str, Any]]:
    return [{"prompt": f"{a}+{b}=", "tag": a} for a, b in QUESTIONS]


def chat_rows() -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"{a}+{b}"}], "tag": a} for a, b in QUESTIONS]


@pytest.fixture(scope="module")
def chat_model(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of ``small_run`` with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(small_run / "base", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class KeepsBatches(TrainerCallback):  # type: ignore[misc]
    """What a probe sampled and what the step was made of, as the trainer's own buffers hold it."""

    def __init__(self, probe: ss.StepProbe) -> None:
        self.probe = probe
        self.probed: list[Any] = []
        self.trained: list[set[tuple[int, ...]]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self.probe._pending is not None
        assert self.probe._recorder is None
        self.probed.append(self.probe._pending.prediction.rollouts)


@pytest.mark.parametrize("evaluated", [False, True])
def test_prompts_and_rewards_are_the_trainers_own(chat_model: Path, tmp_path: Path, evaluated: bool) -> None:
    """Whichever data set they are of, even an ``eval_dataset`` that repeats the training's rows."""
    probe = ss.StepProbe(every=1, num_prompts=12)
    kept = KeepsBatches(probe)
    trainer = make_trainer(
        chat_model,
        tmp_path,
        kept,
        probe,
        rows=chat_rows(),
        chat_template_kwargs={"mood": "calm"},
        eval_dataset=Dataset.from_list(chat_rows()) if evaluated else None,
    )
    generate = trainer._generate_and_score_completions

    def seen(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = generate(inputs)
        pairs = zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        kept.trained.append({tuple(ids[mask.bool()].tolist()) for ids, mask in pairs})
        return output

    trainer._generate_and_score_completions = seen
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    expected = {
        tuple(
            tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, mood="calm", tokenize=True, return_dict=True
            )["input_ids"]
        ): row["tag"]
        for row in chat_rows()
    }
    rows = read_table(tmp_path / "probes.parquet").to_pylist()
    assert len(kept.probed) == len(rows) == 3
    for batch, trained, row in zip(kept.probed, kept.trained, rows, strict=True):
        assert trained <= expected.keys()
        assert len(set(batch.prompt_token_ids)) == 12
        assert set(batch.prompt_token_ids) <= expected.keys() - trained
        for prompt, response, reward in zip(
            batch.prompt_token_ids, batch.response_token_ids, batch.rewards, strict=True
        ):
            text = tokenizer.decode(response, skip_special_tokens=True)
            tag = expected[prompt]
            assert reward == len(text) + (0 if tag % 3 == 0 else 10.0 * tag)
        assert row["reward"] == pytest.approx(batch.rewards.mean())
        where = "eval_dataset" if evaluated else "train_dataset"
        assert row["prompts"] == f"{where} without the prompts of the batch"
        assert row["entropy_logged"] == pytest.approx(row["entropy"], rel=0.3)
        assert row["warning"] == ""


def test_held_out_rows_come_first_and_a_prompt_is_drawn_once(small_run: Path, tmp_path: Path) -> None:
    held_out = {
        "one": Dataset.from_list([{"prompt": "1+2=", "tag": 1}, {"prompt": "1+2=", "tag": 2}]),
        "two": Dataset.from_list([{"prompt": "2+1=", "tag": 1}, {"prompt": "3+1=", "tag": 4}]),
    }
    probe = ss.StepProbe(every=2, num_prompts=3, noise=False, rewards=False)
    kept = KeepsBatches(probe)
    trainer = make_trainer(
        small_run / "base", tmp_path, probe, rows=plain_rows(), eval_dataset=held_out, max_steps=1
    )
    trainer.add_callback(kept)
    trainer.train()
    assert sorted(kept.probed[0].prompts) == ["1+2=", "2+1=", "3+1="]
    (row,) = read_table(tmp_path / "probes.parquet").to_pylist()
    assert row["prompts"] == "eval_dataset without the prompts of the batch"
    assert row["reward_reason"] == "the responses are not graded"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": [len]}, "samples with tools, a probe samples one plain response"),
        ({"train_dataset": iter(())}, "train_dataset is a stream"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "image": ["b"]})}, "columns image, prompt"),
    ],
)
def test_data_that_a_probe_cannot_ask_are_named(changes: dict[str, Any], message: str) -> None:
    trainer = type("Trainer", (), {"eval_dataset": None, "train_dataset": None, **changes})()
    with pytest.raises(ss.errors.ConfigError, match=message):
        TrainerSource(trainer, rewards=True).check(2)


def test_a_probe_of_other_prompts_is_warned_of_once(small_run: Path, tmp_path: Path) -> None:
    probe = ss.StepProbe(task=TASK, template="Q: {question} A: ", every=1, num_prompts=8, noise=False)
    trainer = make_trainer(
        small_run / "base", tmp_path, probe, rows=plain_rows(), per_device_train_batch_size=16
    )
    with pytest.warns(
        UserWarning, match=r"the probe's entropy is .* the trainer logs .* leave out task"
    ) as said:
        trainer.train()
    (warning,) = [str(one.message) for one in said if "StepProbe" in str(one.message)]
    example = json.loads((tmp_path / "probes_example.json").read_text())
    assert example["prompt"].startswith("Q: ")
    assert f"For example: the prompt {example['prompt']!r} was answered" in warning
    rows = read_table(tmp_path / "probes.parquet").to_pylist()
    logged = {entry["step"]: entry["entropy"] for entry in trainer.state.log_history if "loss" in entry}
    assert [row["entropy_logged"] for row in rows] == [logged[step] for step in (1, 2, 3)]
    assert all("are not asked the way the training asks" in row["warning"] for row in rows)
    assert all(row["entropy"] > 1.5 * row["entropy_logged"] for row in rows)


class KeepsPredictions(TrainerCallback):  # type: ignore[misc]
    """What a probe predicted, by step."""

    def __init__(self, probe: ss.StepProbe) -> None:
        self.probe = probe
        self.seen: dict[int, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if self.probe._pending is not None:
            self.seen[state.global_step + 1] = self.probe._pending.prediction


def test_the_documented_line_shows_its_figures_in_trackers(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scalars by the trainer's own callbacks, histograms and coloured responses by the probe."""
    installed = importlib.util.find_spec("wandb") is not None
    if installed:
        wandb_offline(tmp_path, monkeypatch)
    probe = ss.StepProbe(every=2, num_prompts=8, noise=False)
    to = ["tensorboard", "wandb"] if installed else ["tensorboard"]
    trainer = make_trainer(small_run / "base", tmp_path, probe, rows=plain_rows(), report_to=to)
    trainer.add_callback(kept := KeepsPredictions(probe))
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = events_of(folder)
    rows = read_table(tmp_path / "probes.parquet").to_pylist()
    assert [row["step"] for row in rows] == [1, 3]
    for name in ("entropy", "predicted", "realised", "difference", "reward", "seconds"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/probe/{name}")]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    pages, tables = (texts_of(events, f"stepscope/probe/{n}") for n in ("responses", "figures"))
    assert list(pages) == list(tables) == list(kept.seen) == [1, 3]
    for step, made in kept.seen.items():
        rollouts = made.rollouts
        (entropies,) = (
            e.histogram_value for e in events.Histograms("stepscope/probe/token_entropy") if e.step == step
        )
        flat = rollouts.flat(rollouts.entropies)
        assert (entropies.num, entropies.sum) == (len(flat), pytest.approx(flat.sum()))
        (changes,) = (
            e.histogram_value for e in events.Histograms("stepscope/probe/token_change") if e.step == step
        )
        each = made.lr * made.slope.prefix
        assert changes.sum == pytest.approx(each.sum(), rel=1e-5)
        largest = int(np.argmax(np.abs(each.sum(1))))
        assert read(html.escape(rollouts.responses[largest])) in read(pages[step]).replace(
            LOWERS, ""
        ).replace(RAISES, "").replace("\N{RETURN SYMBOL}", "")
        assert pages[step].count(f"{float(np.abs(each).max()):.3g}") >= 1
    if installed:
        history = [row for row in wandb_history(tmp_path) if "stepscope/probe/responses" in row]
        assert [row["train/global_step"] for row in history] == [1, 3]
        for row, expected in zip(history, rows, strict=True):
            assert row["train/probe/entropy"] == pytest.approx(expected["entropy"])
            assert sum(row["stepscope/probe/token_entropy"]["values"]) == len(
                kept.seen[expected["step"]].rollouts.flat(kept.seen[expected["step"]].rollouts.entropies)
            )
        (page, _) = tmp_path.glob("wandb/offline-run-*/files/media/html/stepscope/probe/*.html")
        assert "background:rgba(" in page.read_text(encoding="utf-8")
        (steps,) = yaml.safe_load((tmp_path / "probes_trackers.yaml").read_text())["wandb"].values()
        assert steps == {"probe": [1, 3]}


TRACKIO = """
import sys
from pathlib import Path
import stepscope as ss
from test_probes_source import make_trainer, plain_rows
probe = ss.StepProbe(every=2, num_prompts=8, noise=False)
make_trainer(Path(sys.argv[1]), Path.cwd(), probe, rows=plain_rows(), report_to="trackio").train()
"""


def test_a_training_that_trackio_follows(small_run: Path, tmp_path: Path) -> None:
    """In a process of its own: Trackio takes its folder from the environment when it is loaded."""
    pytest.importorskip("trackio", reason="trackio is not installed: make test-beside installs and tests it")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent)))
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "PYTHONPATH": paths}
    command = [sys.executable, "-c", TRACKIO, str(small_run / "base")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    (database,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics")]
    mine = [row for row in found if "stepscope/probe/responses" in row]
    assert [row["train/global_step"] for row in mine] == [1, 3]
    assert [row["train/global_step"] for row in found if "train/probe/entropy" in row] == [1, 3]
    assert all(sum(row["stepscope/probe/response_length"]["values"]) == 8 for row in mine)


def test_the_trainers_prompts_give_the_numbers_of_the_task(small_run: Path, tmp_path: Path) -> None:
    """Where both are possible: the task's test prompts as ``eval_dataset``, its score as reward function."""
    task = ss.load_task(TASK, template="{question}=", format_weight=0.125)  # TRL keeps rewards in float32

    def rows(split: str) -> list[dict[str, Any]]:
        return [{"prompt": f"{p.question}=", "answer": p.answer} for p in task.problems(split)]

    def score(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        problems = [Problem("", p, a) for p, a in zip(prompts, answer, strict=True)]
        return [task.score(p, c).reward for p, c in zip(problems, completions, strict=True)]

    sizes = {"every": 1, "num_prompts": 8, "seed": 3}
    probes = [ss.StepProbe(**sizes), ss.StepProbe(task=task, name="task", **sizes)]
    trainer = GRPOTrainer(
        model=str(small_run / "base"),
        reward_funcs=score,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=20, learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows("train")),
        eval_dataset=Dataset.from_list(rows("test")),
        callbacks=list(probes),
    )  # fmt: skip
    trainer.train()
    own, explicit = (
        read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("probes", "probes-task")
    )
    left = {"seconds", "prompts"}
    assert len(own) == 2
    for a, b in zip(own, explicit, strict=True):
        assert str({k: v for k, v in a.items() if k not in left}) == str(
            {k: v for k, v in b.items() if k not in left}
        )
        assert a["reward"] > 0
        assert a["realised"] != 0


def states_of(trainer: GRPOTrainer) -> list[Any]:
    moments = [t for entry in trainer.optimizer.state.values() for t in entry.values()]
    return [*trainer.model.state_dict().values(), *moments, torch.get_rng_state()]


def test_grading_with_the_trainers_functions_disturbs_nothing(small_run: Path, tmp_path: Path) -> None:
    ends = []
    for probes in ([], [ss.StepProbe(every=1, num_prompts=8)]):
        trainer = make_trainer(small_run / "base", tmp_path, *probes, rows=plain_rows(), logging_steps=1)
        trainer.train()
        drawn = [entry["drawn"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((states_of(trainer), random.getstate(), drawn))
    (without, state, drawn), (probed, same, drawn_too) = ends
    assert all(torch.equal(a, b) for a, b in zip(without, probed, strict=True))
    assert state == same
    assert drawn == drawn_too == [1.0] * 3


def test_whatever_fails_in_a_probe_the_training_goes_on(small_run: Path, tmp_path: Path) -> None:
    asked = []

    def fragile(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        asked.append(len(completions))
        assert len(completions) == 8, "the judge is out of order"
        return [0.0] * len(completions)

    trainer = make_trainer(
        small_run / "base", tmp_path, ss.StepProbe(every=1, num_prompts=6), rows=plain_rows()
    )
    trainer.reward_funcs[0] = fragile
    expected = (
        r"off from step 1 on, .*: AssertionError at test_probes_source.py:\d+: the judge is out of order"
    )
    with pytest.warns(UserWarning, match=expected) as said:
        trainer.train()
    assert sum("StepProbe" in str(warning.message) for warning in said) == 1
    assert asked == [8, 6, 8, 8]
    example = json.loads((tmp_path / "probes_example.json").read_text())
    assert example["prompt"] in {row["prompt"] for row in plain_rows()}
    assert example["reward"] is None
    assert "the judge is out of order" in example["fault"]
    assert not trainer.model._forward_hooks


def two_probes() -> list[ss.StepProbe]:
    sizes = {"num_prompts": 6, "window": 8}
    return [ss.StepProbe(every=1, noise=False, **sizes), ss.StepProbe(task=TASK, every=2, seed=1, **sizes)]


def tables_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [row | {"seconds": None} for row in read_table(path).to_pylist()]
        for path in sorted(out.glob("probes*.parquet"))
    }


def test_two_probes_keep_apart_and_resume(small_run: Path, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 4}
    trainer = make_trainer(small_run / "base", tmp_path, *two_probes(), rows=plain_rows(), **saved)
    trainer.train()
    whole = tables_of(tmp_path)
    assert {name: [row["step"] for row in rows] for name, rows in whole.items()} == {
        "probes-arithmetic.parquet": [1, 3],
        "probes.parquet": [1, 2, 3, 4],
    }
    assert whole["probes.parquet"][2]["prompts"] == "train_dataset without the prompts of the batch"
    assert whole["probes-arithmetic.parquet"][1]["prompts"] == f"{TASK}, test split"
    entry = next(e for e in trainer.state.log_history if e["step"] == 3)
    assert entry["probe/entropy"] == whole["probes.parquet"][2]["entropy"]
    assert entry["probe/arithmetic/entropy"] == whole["probes-arithmetic.parquet"][1]["entropy"]
    products = [probe._products for probe in trainer.callback_handler.callbacks[:2]]
    for restore in (False, True):
        again = make_trainer(
            small_run / "base",
            tmp_path,
            *two_probes(),
            rows=plain_rows(),
            **saved,
            restore_callback_states_from_checkpoint=restore,
        )
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert str(tables_of(tmp_path)) == str(whole)
        assert [probe._products for probe in again.callback_handler.callbacks[:2]] == products
        assert len(products[0]) == 3


def test_probes_do_not_share_a_table(small_run: Path, tmp_path: Path) -> None:
    probes = [
        ss.StepProbe(num_prompts=4, noise=False, file=tmp_path / "a.parquet", name=n) for n in ("x", "y")
    ]
    trainer = make_trainer(small_run / "base", tmp_path, *probes, rows=plain_rows(), max_steps=1)
    with pytest.warns(UserWarning, match=r"StepProbe y: off .*a\.parquet is the table of another probe"):
        trainer.train()
    assert read_table(tmp_path / "a.parquet").num_rows == 1
