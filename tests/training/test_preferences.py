"""HyPO and DPO: the trainer's step against TRL's and the one that is rebuilt from its checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from digits import SHAPE, DigitTask
from killed import same_state
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from stepscope.config import MeasureConfig, ModelConfig, TrainConfig, build_config
from stepscope.errors import BatchError, ConfigError, StepscopeError, TaskError
from stepscope.measure.step.divergence import divergence_gradient
from stepscope.measure.step.reconstruct import reconstruct_step, weighted_logprobs
from stepscope.pipeline import run_measure, run_train
from stepscope.pipeline.inputs.update_files import update_from_file
from stepscope.pipeline.sizing import batches_in_words, update_file
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.manifest import write_manifest
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.settings import NEXT_BATCH, StepSettings
from stepscope.policy.numerics.precision import true_float64
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.reading.answer import influential_tokens, token_classes, waterfall
from stepscope.reading.measurement import load_measurement
from stepscope.report.parts import Room
from stepscope.report.sections.influence import section as concerning_influence
from stepscope.report.sections.kinds import roles
from stepscope.report.sections.responses import section as shown_responses
from stepscope.training.preferences.pairs import kept_pairs, read_pairs
from stepscope.training.preferences.run import PAIRS, prefer
from stepscope.training.preferences.trainer import PreferenceTrainer, RowsOfSteps
from stepscope.training.setup.arguments import shared_arguments
from stepscope.training.setup.start import starting_model

TASK = DigitTask(num_dead=0)
ROWS = [{"prompt": f"{i}=", "chosen": f"{i}{i + 1}", "rejected": "+" * (1 + i % 3)} for i in range(6)]


def pairs_file(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def config_of(pairs: Path | None, *, lora: bool = False, **hypo: Any) -> TrainConfig:
    """Steps on two micro-batches of two pairs and six samples, in float64."""
    settings = {
        "pairs": None if pairs is None else str(pairs),
        "pairs_per_step": 4,
        "micro_batch_size": 2,
        "kl_weight": 0.5,
        "kl_group_size": 3,
        "max_response_tokens": 6,
        "steps": 3,
        "save_every": 1,
        "report_to": [],
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5},
    }
    model = ModelConfig(tiny=SHAPE).model_dump() | {"dtype": "float64", "lora": {"r": 2} if lora else None}
    return build_config(TrainConfig, {"model": model, "sft": None, "rl": None, "hypo": settings | hypo})


def ids(**changed: Any) -> dict[str, Any]:
    """A row of token ids."""
    row = {"prompt": [2, 3], "chosen": [2, 3], "rejected": [2]} | changed
    return {"question": "x"} | {f"{name}_token_ids": value for name, value in row.items()}


def preferred(config: TrainConfig, out: Path, *, resume: Path | None = None, task: DigitTask = TASK) -> Path:
    """Train an untrained policy, all of it in float64; the folder of its checkpoints."""
    model, tokenizer = starting_model(config.model, seed=0)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    with true_float64():
        prefer(config, model, tokenizer, task, out, resume=resume)
    return out / "checkpoints"


def assert_steps_are_rebuilt(checkpoints: Path, reference: Policy | None, steps: range) -> None:
    for number in steps:
        policy = load_checkpoint(checkpoints / f"step-{number}", precision="float64")
        given = update_from_file(
            policy, checkpoints / f"step-{number}" / NEXT_BATCH, step=None, budget=Budget()
        )
        step = reconstruct_step(policy, given.rollouts, reference=reference)
        file = next((checkpoints / f"step-{number + 1}").glob("*model.safetensors"))
        moved = {name.replace(".weight", ""): value for name, value in load_file(file).items()}
        real = {}
        for name, p in policy.parameters.items():
            after = moved[name.replace(".weight", "").replace(".default", "")]
            real[name] = (after - p.detach()) / step.lr
        apart = vectors.norm(vectors.add(step.direction, vectors.scale(real, -1.0)))
        assert apart <= 1e-6 * vectors.norm(real)  # TRL's head multiplies in float32 in its backward pass
        assert step.clip_coefficient < 1


@pytest.fixture(scope="module")
def hypo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of HyPO on six pairs of a file; the second step begins the second pass over them."""
    out = tmp_path_factory.mktemp("hypo")
    return preferred(config_of(pairs_file(out)), out / "run").parent


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sums over the vocabulary, two samples a prompt of the task, in four micro-batches."""
    out = tmp_path_factory.mktemp("exact")
    changed: dict[str, Any] = {"kl_prompts": "task", "micro_batch_size": 1, "kl_group_size": 2, "beta": 0.7}
    config = config_of(pairs_file(out), kl_estimator="rao_blackwell", **changed)
    return preferred(config, out / "run").parent


def test_the_next_step_is_rebuilt_from_a_checkpoint(hypo_run: Path) -> None:
    reference = load_checkpoint(hypo_run / "checkpoints/step-0", precision="float64", require_optimizer=False)
    assert_steps_are_rebuilt(hypo_run / "checkpoints", reference, range(1, 3))
    settings = StepSettings.load(hypo_run / "checkpoints/step-1")
    assert (settings.loss_type, settings.loss_parameters["kl_weight"]) == ("hypo", 0.5)


def test_the_next_step_with_sums_over_the_vocabulary_is_rebuilt(exact_run: Path) -> None:
    reference = load_checkpoint(
        exact_run / "checkpoints/step-0", precision="float64", require_optimizer=False
    )
    assert_steps_are_rebuilt(exact_run / "checkpoints", reference, range(1, 3))


def test_without_the_divergence_the_step_is_another(hypo_run: Path) -> None:
    """The batch's samples make a part of the step; DPO's on its pairs alone is not the trainer's."""
    reference = load_checkpoint(hypo_run / "checkpoints/step-0", precision="float64", require_optimizer=False)
    checkpoint = hypo_run / "checkpoints/step-1"
    policy = load_checkpoint(checkpoint, precision="float64")
    update = update_from_file(policy, checkpoint / NEXT_BATCH, step=None, budget=Budget()).rollouts
    samples = [i for i, name in enumerate(update.prompt_ids) if "sample" in name]
    assert len(samples) == 12
    step = reconstruct_step(policy, update, reference=reference)
    assert all(step.token_weights[i].any() for i in samples)


@pytest.mark.parametrize("estimator", ["leave_one_out", "rao_blackwell"])
def test_the_step_of_an_adapter_is_rebuilt_without_a_reference(estimator: str, tmp_path: Path) -> None:
    config = config_of(pairs_file(tmp_path), lora=True, steps=2, kl_estimator=estimator)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"source": str(tmp_path / "run/base")})}
    )
    model, tokenizer = starting_model(config_of(None).model, seed=0)
    model.save_pretrained(tmp_path / "run/base")
    tokenizer.save_pretrained(tmp_path / "run/base")
    assert_steps_are_rebuilt(preferred(config, tmp_path / "run"), None, range(1, 2))


def test_dpo_is_trls_own_bit_for_bit(tmp_path: Path) -> None:
    """Weights after three steps of TRL's trainer on the texts, in the order of ours."""
    config = config_of(pairs_file(tmp_path), kl_weight=0.0, save_every=3)
    ours = preferred(config, tmp_path / "ours")
    assert StepSettings.load(ours / "step-3").loss_type == "dpo"
    hypo = config.hypo
    assert hypo is not None
    model, tokenizer = starting_model(config.model, seed=0)
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        beta=hypo.beta,
        max_length=None,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        save_steps=3,
        **shared_arguments(hypo.optimizer, seed=0, report_to=[]),
    )
    with true_float64():
        DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=arguments,
            train_dataset=Dataset.from_list([ROWS[i] for i in RowsOfSteps(6, 4, 3, 0)]),
            processing_class=tokenizer,
        ).train()
    theirs, own = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "trl/checkpoint-3", ours / "step-3")
    )
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in theirs)
    start = load_file(ours / "step-0/model.safetensors")
    assert not any(torch.equal(own[name], start[name]) for name in start)


def test_a_training_goes_on_bitwise(hypo_run: Path, tmp_path: Path) -> None:
    shutil.copytree(hypo_run, tmp_path / "again")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"again/checkpoints/step-{step}")
    resume = tmp_path / "again/checkpoints/step-1"
    preferred(config_of(tmp_path / "gone.jsonl"), tmp_path / "again", resume=resume)  # its pairs are kept
    for step in (2, 3):
        one, two = (run / f"checkpoints/step-{step}" for run in (hypo_run, tmp_path / "again"))
        same_state(one, two)
        assert (one / NEXT_BATCH).read_bytes() == (two / NEXT_BATCH).read_bytes()


@pytest.mark.parametrize("estimator", ["leave_one_out", "rao_blackwell"])
def test_the_loss_of_the_samples_has_the_gradient_that_is_stated(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out from the logits of all samples, with loops, against the sum over micro-batches.

    The step that is rebuilt has the same gradient of the samples: token weights, and a term of sums over the
    vocabulary.
    """
    seen: list[Any] = []

    def caught(self: PreferenceTrainer, *args: Any) -> torch.Tensor:
        drawn = self.samples(self.state.global_step)
        if self._place == 0 and not seen:
            with torch.no_grad():
                self.model.lm_head.weight.mul_(1.5)  # away from the reference, where all is 0
            self._drawn = None
            drawn = self.samples(0)
            parts = [self._divergence(self.model, drawn, range(k, k + 6)) for k in (0, 6)]
            params = dict(self.model.named_parameters())
            grads = torch.autograd.grad(torch.stack(parts).sum(), list(params.values()))
            seen.extend([drawn, dict(zip(params, grads, strict=True))])
            self.write_next_batch(tmp_path)
            models = (self.model, self.ref_model)
            seen.append([{n: p.clone() for n, p in m.state_dict().items()} for m in models])
        return original(self, *args)

    original = PreferenceTrainer._compute_loss
    monkeypatch.setattr(PreferenceTrainer, "_compute_loss", caught)
    config = config_of(pairs_file(tmp_path), kl_estimator=estimator, steps=1)
    preferred(config, tmp_path / "run")
    drawn, found, states = seen
    model, reference = (starting_model(config.model, seed=0)[0] for _ in states)
    for made, state in zip((model, reference), states, strict=True):
        made.load_state_dict(state)
    batch = make_batch(drawn.rollouts.prompt_token_ids, drawn.rollouts.response_token_ids)
    with true_float64():
        pi = forward(model, batch, temperature=1.0, keep_logits=True).logits.log_softmax(-1)
        with torch.no_grad():
            ref = forward(reference, batch, temperature=1.0, keep_logits=True).logits.log_softmax(-1)
    exact = estimator == "rao_blackwell"
    divergence = (pi.exp() * (pi - ref)).sum(-1)
    total = torch.zeros((), dtype=torch.float64)
    lengths = [len(ids) for ids in drawn.rollouts.response_token_ids]
    assert max(lengths) > 1
    chosen = pi.gather(-1, batch.response_ids[..., None])[..., 0]
    gap = chosen - ref.gather(-1, batch.response_ids[..., None])[..., 0]
    ahead = [
        [float((divergence[i, k + 1 : n] if exact else gap[i, k:n]).sum().detach()) for k in range(n)]
        + [0.0] * 6
        for i, n in enumerate(lengths)
    ]
    for i, n in enumerate(lengths):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        for k in range(n):
            factor = ahead[i][k] - sum(ahead[j][k] for j in others) / 2
            total = total + factor * chosen[i, k] + (divergence[i, k] if exact else 0.0)
    params = dict(model.named_parameters())
    expected = torch.autograd.grad(total / len(lengths), list(params.values()))
    for name, value in zip(params, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)
    trained = load_checkpoint(tmp_path / "run/checkpoints/step-1", precision="float64")
    trained = replace(trained, model=model)  # as it was trained, with its float32 rotations
    other = Policy(reference, None, trained.settings)
    with true_float64():
        update = update_from_file(trained, tmp_path / NEXT_BATCH, step=1, budget=Budget()).rollouts
        step = reconstruct_step(trained, update, reference=other)
        sampled = [i for i, name in enumerate(update.prompt_ids) if "sample" in name]
        weights = [step.token_weights[i] for i in sampled]
        rebuilt = gradient(trained, update.select(sampled), weighted_logprobs(weights))
        of_vocabulary = divergence_gradient(trained, update, other, Budget())
    assert ("divergence" in step.components) == bool(of_vocabulary) == exact
    if exact:
        assert vectors.norm(of_vocabulary) > 0.1 * vectors.norm(rebuilt)
        rebuilt = vectors.add(rebuilt, of_vocabulary)
    stated = vectors.scale(dict(zip(params, expected, strict=True)), -0.5)  # kl_weight
    stated = {name: stated[name] for name in rebuilt}
    apart = vectors.norm(vectors.add(rebuilt, vectors.scale(stated, -1.0)))
    assert apart <= 1e-11 * vectors.norm(stated)


def test_pairs_are_right_against_wrong_responses_of_a_prompt(tmp_path: Path) -> None:
    """Of the starting policy, at most two to a prompt; kept for the continuation."""
    task = DigitTask(num_dead=0, size=24)
    config = config_of(
        None, pair_prompts=24, pair_samples=8, steps=1, kl_prompts="task", max_response_tokens=8
    )
    checkpoints = preferred(config, tmp_path, task=task)
    pairs = kept_pairs(tmp_path / PAIRS)
    _, tokenizer = starting_model(config.model, seed=0)
    by_question = {p.question: p for p in task.problems("train")}
    for pair in pairs:
        problem = by_question[pair.question]
        assert tokenizer.decode(list(pair.prompt)) == f"{pair.question}="
        right, wrong = (
            task.score(problem, tokenizer.decode(list(ids), skip_special_tokens=True)).correct
            for ids in (pair.chosen, pair.rejected)
        )
        assert (right, wrong) == (True, False)
    counts = [sum(p.question == q for p in pairs) for q in by_question]
    assert max(counts) == 2
    assert len(set(pairs)) == len(pairs)
    lines = [json.loads(line) for line in (checkpoints / "step-1" / NEXT_BATCH).read_text().splitlines()]
    asked = [line["prompt"] for line in lines if line["prompt_id"].startswith("sample/")]
    assert len(set(asked)) == 4
    assert set(asked) <= set(by_question)


def test_prompts_that_are_too_long_make_no_pairs(tmp_path: Path) -> None:
    """They are left out as for the samples, where sampling would have cut their beginning off."""
    task = DigitTask(num_dead=0, size=24)
    every = task.problems("train")
    assert {len(p.question) for p in every} == {1, 2}
    short = [p.question for p in every if len(p.question) == 1]
    changed = {"pair_prompts": len(short), "max_prompt_tokens": 2, "pairs_per_step": 1, "micro_batch_size": 1}
    config = config_of(None, pair_samples=16, steps=1, max_response_tokens=8, **changed)
    preferred(config, tmp_path, task=task)
    assert {pair.question for pair in kept_pairs(tmp_path / PAIRS)} <= set(short)
    more = config.model_copy(update={"hypo": config.hypo.model_copy(update={"pair_prompts": 24})})  # type: ignore[union-attr]
    with pytest.raises(BatchError, match="less copies and those that are excluded, are not enough for 24"):
        preferred(more, tmp_path / "more", task=task)


def test_rows_of_steps_are_every_row_once_and_then_again() -> None:
    order = RowsOfSteps(rows=6, per_step=4, steps=6, seed=3)
    rows = list(order)
    assert len(rows) == len(order) == 24
    for start in range(0, 24, 6):
        assert sorted(rows[start : start + 6]) == list(range(6))
    assert rows[:6] != rows[6:12]
    assert order.of(2) == rows[8:12]
    assert list(RowsOfSteps(rows=6, per_step=4, steps=6, seed=4)) != rows


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ({"prompt": "1=", "chosen": "2"}, TaskError, "line 1: no field 'rejected'"),
        ({"prompt": "1=", "chosen": "2", "rejected": "2"}, TaskError, "are the same response"),
        (
            {"prompt": "1=", "chosen": "2" * 6, "rejected": "2"},
            ConfigError,
            "has 7 tokens, its end among them, and 6",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "2", "rejected": "3"},
            TaskError,
            "the user's",
        ),
        (
            {"prompt": "1=", "chosen": [{"role": "user", "content": "x"}], "rejected": "3"},
            TaskError,
            "one message of",
        ),
        (
            {"prompt": "1=", "chosen": "", "rejected": "3"},
            TaskError,
            "chosen must be a text that is not empty",
        ),
        (
            {"prompt": "12345=", "chosen": "2", "rejected": "3"},
            ConfigError,
            "has 6 tokens, and 5 are allowed",
        ),
        (ids(chosen=[2, 3.7]), TaskError, r"chosen_token_ids has 3.7 in it, expected token ids"),
        (ids(chosen=[2, True]), TaskError, "chosen_token_ids has true in it"),
        (ids(rejected=[2, "3"]), TaskError, "rejected_token_ids has '3' in it"),
        (ids(rejected=[-2]), TaskError, "rejected_token_ids has -2 in it"),
        (ids(rejected=[2, 900]), TaskError, "token 900, and the model knows 0 to 899"),
        (ids(prompt=[]), TaskError, "expected token ids, one at least"),
        (ids(prompt="23"), TaskError, "expected token ids, one at least"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(
    line: dict[str, Any], error: type[StepscopeError], message: str, tmp_path: Path
) -> None:
    _, tokenizer = starting_model(config_of(None).model, seed=0)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(error, match=message):
        read_pairs(path, tokenizer, longest=6, longest_prompt=5, vocabulary=900)
    path.write_text(json.dumps(ids(rejected=[2, 899])) + "\n")
    (pair,) = read_pairs(path, tokenizer, longest=6, longest_prompt=5, vocabulary=900)
    assert (pair.chosen, pair.rejected) == ((2, 3), (2, 899))


def test_too_few_pairs_and_other_files_are_refused(tmp_path: Path) -> None:
    _, tokenizer = starting_model(config_of(None).model, seed=0)
    with pytest.raises(TaskError, match=r"expected a .jsonl or .parquet file"):
        read_pairs(tmp_path / "pairs.csv", tokenizer, longest=6)
    with pytest.raises(TaskError, match="no such file"):
        read_pairs(tmp_path / "pairs.parquet", tokenizer, longest=6)
    config = config_of(pairs_file(tmp_path), pairs_per_step=8)
    with pytest.raises(ConfigError, match=r"8 pairs asked for, .*pairs.jsonl has 6; give a longer file"):
        preferred(config, tmp_path / "run")
    long = {"prompt": "1" * 1018 + "=", "chosen": "2", "rejected": "3"}
    (tmp_path / "long.jsonl").write_text(4 * (json.dumps(long) + "\n"))
    fits = config_of(tmp_path / "long.jsonl", kl_weight=0.0, steps=1)
    assert (preferred(fits, tmp_path / "fits") / "step-1").is_dir()
    with pytest.raises(ConfigError, match=r"hypo.kl_prompts, .* longest has 1025 tokens .* 1024 positions"):
        preferred(config_of(tmp_path / "long.jsonl", steps=1), tmp_path / "long")
    with pytest.raises(ConfigError, match="rl and hypo are both there"):
        build_config(TrainConfig, {"hypo": {}})


def test_measure_takes_the_batch_beside_the_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    """A training of the configuration file, measured by the verb; without its batch it is refused."""
    start = trained_run / "base"
    hypo = {
        "pairs": str(pairs_file(tmp_path)),
        "pairs_per_step": 4,
        "micro_batch_size": 4,
        "steps": 1,
        "save_every": 1,
        "kl_estimator": "rao_blackwell",
    }
    sections = {"model": {"source": str(start)}, "sft": None, "rl": None, "hypo": hypo | {"report_to": []}}
    run = tmp_path / "run"
    task = {"task": "arithmetic:terms=2,digits=2,ops=+", "out": str(run)}
    last = run_train(build_config(TrainConfig, sections | task))
    wanted = {
        "checkpoint": str(last),
        "out": str(tmp_path / "m"),
        "stages": ["rollouts", "step", "change", "influence"],
        "probe": {"num_prompts": 8},
    }
    begun = last.parent / "step-0"
    with pytest.raises(StepscopeError, match=rf"give reference={begun} \(the model .* from\)$"):
        run_measure(build_config(MeasureConfig, wanted))
    config = build_config(MeasureConfig, wanted | {"reference": str(begun)})
    words = batches_in_words(config, update_file(config, StepSettings.load(last)))
    assert words == f"{last / NEXT_BATCH} makes the step, 8 x 1 measure it"
    run_measure(config)
    figures = json.loads((tmp_path / "m/summary.json").read_text())
    assert figures["influence_divergence"]["value"] != 0
    assert sum(figures[f"share_{n}"]["value"] for n in ("momentum", "decay", "sequences", "divergence")) == (
        pytest.approx(1.0, rel=1e-4)
    )
    assert "say which response is chosen" in json.dumps(figures["mean_reward_update"])
    measurement = load_measurement(tmp_path / "m")
    parts = {part.name: part.value.value for part in token_classes(measurement, "role")}
    tokens, batch, change = influential_tokens(measurement), measurement.update, measurement.change
    assert tokens is not None
    assert batch is not None
    assert change is not None
    assert set(parts) == {"chosen", "rejected", "sampled"}
    sampled = [i for i, name in enumerate(batch.prompt_ids) if "sample" in name]
    own = float(tokens[tokens.sequence_id.isin(sampled)].influence.sum()) * change.lr
    assert parts["sampled"] == pytest.approx(own, rel=1e-12)
    assert roles(measurement, Room(1)) is not None
    assert "KL divergence" in {part.name for part in waterfall(measurement).parts}  # type: ignore[union-attr]
    said = str(concerning_influence(measurement, Room(1)))
    assert "incorrect" not in said  # samples were not graded
    assert "Half of the absolute token influence" in said
    assert "chosen, rejected and sampled responses" in str(shown_responses(measurement, Room(1)))
    (last / NEXT_BATCH).write_text((last / NEXT_BATCH).read_text().replace('"reward": 1.0', '"reward": 2.0'))
    again = wanted | {"reference": str(start), "out": str(tmp_path / "n")}
    with pytest.raises(BatchError, match=f"{NEXT_BATCH} is not what was written"):
        run_measure(build_config(MeasureConfig, again))
    (last / NEXT_BATCH).unlink()
    write_manifest(last)
    with pytest.raises(BatchError, match="takes pairs of responses, which are not sampled"):
        run_measure(build_config(MeasureConfig, again | {"out": str(tmp_path / "o")}))
