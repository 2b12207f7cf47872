"""Central lines are held by tests: each is changed in a copy of the tree, and the tests beside it must fail.

``pytest -m slow -rP tests/test_mutation.py`` also prints which tests fail. A line is known by its text: where
the code moves on, the quick test says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """One line changed.

    Attributes:
        file: under ``src/stepscope``.
        line: text that stands there once.
        becomes: what stands there instead.
        tests: under ``tests``, what has to fail.
    """

    file: str
    line: str
    becomes: str
    tests: str


STEP = "measure/test_step.py::test_direction_is_the_step_adamw_takes"
MUTATIONS = {
    "the gradient is not clipped": Mutation(
        "measure/step/reconstruct.py",
        "clip = min(1.0, limit / (norm + CLIP_EPSILON)) if limit > 0 else 1.0",
        "clip = 1.0",
        STEP,
    ),
    "momentum pushes the other way": Mutation(
        "policy/optim/adamw.py",
        "-terms.scale * beta1 * terms.first / denominator,",
        "terms.scale * beta1 * terms.first / denominator,",
        STEP,
    ),
    "decay pushes the other way": Mutation(
        "policy/optim/by_parameter.py",
        "return -factor * self.weights",
        "return factor * self.weights",
        STEP,
    ),
    "the preconditioner lacks 1 - b1": Mutation(
        "policy/optim/adamw.py",
        "terms.scale * (1 - beta1) * at.clip / denominator,",
        "terms.scale * at.clip / denominator,",
        STEP,
    ),
    "the second moment does not follow its own gradient": Mutation(
        "policy/optim/adamw.py",
        "((1 - beta1) / denominator - moment / denominator**2 * rise)",
        "((1 - beta1) / denominator)",
        "measure/test_step_derivative.py::test_influence_through_the_optimizer_is_what_torch_does",
    ),
    "token weights are those of descent": Mutation(
        "policy/loss/surrogate.py",
        "weights = (-grad).numpy()",
        "weights = grad.numpy()",
        "policy/test_objective.py::test_on_policy_weights_are_the_closed_form_of_each_loss",
    ),
    "rewards keep their mean": Mutation(
        "policy/loss/advantages.py",
        "centred = values - values.mean()",
        "centred = values",
        "policy/test_advantages.py::test_advantages_equal_what_trl_computes_while_training",
    ),
    "entropy is negative": Mutation(
        "policy/forward.py",
        "entropies = -(probs * distribution).sum(-1)",
        "entropies = (probs * distribution).sum(-1)",
        "policy/test_forward.py::test_padded_batch_agrees_with_unpadded_sequences[qwen2]",
    ),
    "a prefix is weighted by the token after it": Mutation(
        "measure/quantity/importance_weights.py",
        "before = np.concatenate([np.zeros((len(ratio), 1)), through[:, :-1]], axis=1)",
        "before = through",
        "measure/test_weights.py",
    ),
    "the mean over tokens is not taken off": Mutation(
        "measure/quantity/estimators.py",
        "return self.centre if self.quantity.on_policy else 0.0",
        "return 0.0",
        "measure/test_quantities.py test_reference.py",
    ),
    "returns do not weigh the log-probs": Mutation(
        "measure/quantity/objective.py",
        "values = values + returns * outputs.logprobs",
        "values = values + returns * outputs.logprobs.detach()",
        "measure/test_quantities.py::test_the_surrogate_differentiates_to_the_linear_change",
    ),
    "errors of few prompts are too small": Mutation(
        "stats.py",
        "error = float(np.sqrt(count / (count - 1) * (parts**2).sum()))",
        "error = float(np.sqrt((parts**2).sum()))",
        "test_stats.py",
    ),
    "a response couples with itself": Mutation(
        "measure/kernel/structure.py",
        '"same_prompt": same & ~own',
        '"same_prompt": same',
        "measure/test_fisher.py::test_components_of_a_constructed_kernel",
    ),
    "the token that ends a response is cut off": Mutation(
        "policy/sampling/generate.py",
        "length = next((k + 1 for k, token in enumerate(row) if token in stops), len(row))",
        "length = next((max(k, 1) for k, token in enumerate(row) if token in stops), len(row))",
        "policy/test_rollouts.py",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_line_stands_where_it_is_said_to(mutation: Mutation) -> None:
    assert (ROOT / "src/stepscope" / mutation.file).read_text().count(mutation.line) == 1
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        name = name.partition("[")[0]
        assert re.search(rf"^def {name}", (ROOT / "tests" / file).read_text(), re.M), test


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its tests."""
    copy = tmp_path_factory.mktemp("mutated")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_changed_line_is_noticed(tree: Path, mutation: Mutation) -> None:
    file = tree / "src/stepscope" / mutation.file
    text = file.read_text()
    file.write_text(text.replace(mutation.line, mutation.becomes))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in mutation.tests.split())],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    file.write_text(text)
    print("\n".join(re.findall(r"^FAILED (.*)", done.stdout, re.M)))
    assert done.returncode == 1, f"survived: {done.stdout[-500:]}"
