from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from stepscope.errors import TaskError
from stepscope.tasks import load_task
from stepscope.tasks.judge.guards import EVALUATING, evaluates, require_expression
from stepscope.tasks.judge.worker import Worker, shared_worker
from stepscope.tasks.sources import reasoning

SPECS = [
    "rg:chain_sum:size=500,min_terms=2",
    "rg:countdown",
    "rg:gsm_symbolic",
    "rg:list_functions",
    "rg:ransom_note",
]


@pytest.mark.parametrize("spec", SPECS)
def test_demonstrations_score_one(spec: str) -> None:
    task = load_task(spec)
    for split in ("train", "test"):
        for problem in task.problems(split)[:4]:
            score = task.score(problem, task.demonstration(problem))
            assert (score.reward, score.correct, score.formatted) == (1.0, True, True)
            wrong = task.score(problem, "<think></think><answer>no such thing</answer>")
            assert wrong.reward < 1
            assert not wrong.correct


def test_ids_and_splits() -> None:
    task = load_task("rg:chain_sum:size=30,test_size=20,max_terms=2,max_digits=1")
    train, test = task.problems("train"), task.problems("test")
    assert (len(train), len(test)) == (30, 20)
    assert train[-1].prompt_id == "rg:chain_sum:max_digits=1,max_terms=2/train/29"
    assert not {p.question for p in train} & {p.question for p in test}
    larger = load_task("rg:chain_sum:max_terms=2,max_digits=1")
    assert larger.problems("train")[29] == train[29]
    with pytest.raises(IndexError):
        train[30]


def test_a_generator_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "ITEM_LIMIT", 5.0)
    with pytest.raises(TaskError, match=r"train/0: reasoning-gym failed or took more than 5 s to generate"):
        load_task("rg:chain_sum:max_digits=1000000000").problems("train")[0]


def test_the_version_of_the_generators_is_the_digest() -> None:
    assert load_task("rg:chain_sum").digest == f"reasoning-gym {version('reasoning-gym')}"


def test_partial_credit_is_the_reward() -> None:
    task = load_task("rg:countdown")
    problem = task.problems("train")[0]
    score = task.score(problem, "<think></think><answer>1 + 1</answer>")
    assert 0 < score.reward < 1
    assert not score.correct


def test_items_do_not_depend_on_order_or_process() -> None:
    """Some generators use the global random state or the hash seed; the worker fixes both."""
    workers = Worker(), shared_worker()
    for name in ("list_functions", "isomorphic_strings", "polynomial_multiplication", "ransom_note"):
        question = {"op": "item", "name": name, "config": "{}", "seed": 0, "split": "train"}
        orders = ((5, 3, 0), (0, 3, 5))
        found = [
            {i: worker.ask({**question, "index": i}, time_limit=120) for i in order}
            for worker, order in zip(workers, orders, strict=True)
        ]
        assert found[0] == found[1]
        assert None not in found[0].values()
    workers[0].close()


@pytest.mark.parametrize(
    "answer", ["9**9**9**9", "(((", "", "__import__('os').getcwd()", "1" * 30_000, "\x00"]
)
def test_hostile_answers_earn_nothing_much(answer: str) -> None:
    task = load_task("rg:countdown")
    assert not task.score(task.problems("train")[0], f"<think></think><answer>{answer}</answer>").correct


def test_a_task_without_reference_answers_has_no_demonstration() -> None:
    task = load_task("rg:propositional_logic")
    with pytest.raises(TaskError, match="no reference answers"):
        task.demonstration(task.problems("train")[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rg:chain_sun", "no dataset 'chain_sun'; did you mean 'chain_sum'"),
        ("rg:chain_sum:min_term=2", "no option min_term; options are min_terms"),
        ("rg:chain_sum:min_terms=-2", "refuses these options"),
        ("rg:chain_sum:size=99999", "at most 10000"),
        ("rg:chain_sum:max_digits=99999999999", "max_digits must be a number between"),
        ("rg:chain_sum:min_terms=NaN", "min_terms must be a number between"),
        ("rg:chain_sum:min_terms=" + "[" * 1_000, "refuses these options"),
        ("rg:chain_sum:min_terms=" + "1" * 5_000, "5010 characters of options, expected at most 2000"),
        ("rg", "unknown task 'rg': available are"),
    ],
)
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)


UNSOUND = {
    "coin_flip": "0",
    "complex_arithmetic": "nan",
    "game_of_life_halting": "banana",
    "puzzle24": "1*2*3*4",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_a_scorer_that_rewards_nonsense_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=r"accept_unsound=true") as caught:
        load_task(f"rg:{name}")
    assert repr(UNSOUND[name]) in str(caught.value)
    task = load_task(f"rg:{name}:accept_unsound=true")
    problem = task.problems("train")[0]
    assert problem.prompt_id == f"rg:{name}/train/0"
    assert task.score(problem, task.demonstration(problem)).correct
    with pytest.raises(TaskError, match="accept_unsound must be true or false, got 1"):
        load_task(f"rg:{name}:accept_unsound=1")


@pytest.mark.parametrize(
    ("text", "arithmetic"),
    [
        ("(1 + 2.5)*3 - 4/-x**2", True),
        ("sqrt(x) + log(2*x, 10) + C", True),
        ("x.__class__", False),
        ("__import__", False),
        ("eval('1')", False),
        ("(lambda: 1)()", False),
        ("sin(x, evaluate=False)", False),
        ("[1, 2][0]", False),
        ("'a'*9", False),
        ("True", False),
        ("1 if x else 2", False),
        ("f'{1}'", False),
        ("x := 1", False),
        ("sin(*x)", False),
    ],
)
def test_only_arithmetic_is_evaluated(text: str, arithmetic: bool) -> None:
    if arithmetic:
        require_expression(text)
    else:
        with pytest.raises(SyntaxError):
            require_expression(text)


def test_literals_are_read_as_before() -> None:
    """``spiral_matrix`` gives a tenth for the right list written as Python."""
    task = load_task("rg:spiral_matrix")
    problem = task.problems("train")[0]
    numbers = problem.answer.split()
    for answer, reward in [
        (problem.answer, 1.0),
        (json.dumps([int(n) for n in numbers]), 0.1),
        (f"[int(n) for n in {problem.answer!r}.split()]", 0.0),
    ]:
        assert task.score(problem, f"<think></think><answer>{answer}</answer>").reward == reward


def test_which_specifications_evaluate_answers() -> None:
    assert len(EVALUATING) == 9
    assert evaluates("rg:puzzle24")
    assert evaluates("rg:n_queens:n=5")
    assert not any(evaluates(spec) for spec in ("rg:chain_sum", "gsm8k", "arithmetic", "jsonl:puzzle24"))


@pytest.mark.skipif(sys.platform != "linux", reason="takes Landlock away from a process")
def test_without_isolation_scorers_that_evaluate_are_refused() -> None:
    code = """
import errno, sys, warnings
from seccompy import Filter
blind = Filter()
blind.errno("landlock_create_ruleset", errno.ENOSYS)
blind.load()
from stepscope.errors import TaskError
from stepscope.tasks import load_task
with warnings.catch_warnings(record=True) as caught:
    load_task("rg:chain_sum")
print(*(w.message for w in caught))
try:
    task = load_task("rg:countdown")
    print(task.score(task.problems("train")[0], "<think></think><answer>1</answer>").reward)
except TaskError as error:
    print(error)
"""
    for allowed, expected in [("0", "cannot be isolated here"), ("1", "0.05")]:
        environment = {**os.environ, "STEPSCOPE_UNISOLATED": allowed}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert found.returncode == 0, found.stderr
        warned, verdict = found.stdout.splitlines()
        assert "answers are not isolated on this system: its kernel offers no Landlock" in warned
        assert expected in verdict


@pytest.mark.slow
def test_every_task_of_reasoning_gym() -> None:
    reply = shared_worker().ask({"op": "describe", "name": "", "config": "{}"}, time_limit=120)
    assert reply is not None
    without = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
    assert len(reply["names"]) > 100
    for name in set(reply["names"]) - {"composite"}:
        task = load_task(f"rg:{name}" + (":accept_unsound=true" if name in UNSOUND else ""))
        for split in ("train", "test"):
            for problem in task.problems(split)[:3]:
                unsolved = name == "intermediate_integration" and "Integral" in problem.answer
                if name not in without and not unsolved:  # sympy left some references as they were asked
                    score = task.score(problem, task.demonstration(problem))
                    assert (score.correct, score.formatted) == (True, True), problem.prompt_id
