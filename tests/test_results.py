"""Rollouts: shape checks, selection, exact round trip through parquet."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cases
from stepscope.errors import BatchError, RunFolderError
from stepscope.results import FloatArray, Rollouts, RolloutTokens, read_table, write_table
from stepscope.stats import clustered_mean


def make_rollouts(seed: int = 0, advantages: bool = True) -> Rollouts:
    generator = np.random.default_rng(seed)
    lengths = [3, 1, 4, 2]
    return Rollouts(
        prompt_ids=("a/1", "a/1", "a/2", "a/2"),
        prompts=("1+1=", "1+1=", "2+é=", "2+é="),
        responses=("x", "", "日本", "<eos>"),
        prompt_token_ids=((1, 2), (1, 2), (3,), (3,)),
        response_token_ids=tuple(tuple(int(t) for t in generator.integers(0, 9, n)) for n in lengths),
        rewards=np.array([1.0, 0.0, 0.1, 1 / 3]),
        correct=np.array([True, False, False, True]),
        truncated=np.array([False, False, True, False]),
        logprobs=tuple(-generator.exponential(1, n) for n in lengths),
        entropies=tuple(generator.exponential(1, n) for n in lengths),
        temperature=0.7,
        max_response_tokens=4,
        advantages=generator.normal(size=4) if advantages else None,
    )


def test_sequences_as_a_data_frame() -> None:
    batch = make_rollouts()
    frame = batch.to_pandas()
    assert frame["reward"].tolist() == batch.rewards.tolist()
    assert frame["num_tokens"].tolist() == [3, 1, 4, 2]


def assert_same(a: Rollouts, b: Rollouts) -> None:
    for field in fields(Rollouts):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("logprobs", "entropies"):
            assert [x.tobytes() for x in left] == [x.tobytes() for x in right]
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()
        else:
            assert left == right, field.name


def asked(texts: list[str], rewards: FloatArray) -> Rollouts:
    """One response to each row of a file that asks these texts: every row has an id of its own."""
    ids = tuple(f"jsonl:own/test/{i}" for i in range(len(texts)))
    same = [(1,)] * len(texts)
    return cases.rollouts(same, same, prompt_ids=ids, prompts=tuple(texts), rewards=rewards)


def test_a_prompt_is_its_text_and_a_group_its_id():
    rollouts = asked(["a", "b", "a \r\n", "", "", "A", "caf\u00e9", "cafe\u0301"], np.zeros(8))
    assert rollouts.prompt_index.tolist() == [0, 1, 0, 2, 3, 4, 5, 5]
    assert rollouts.group_index.tolist() == list(range(8))
    assert rollouts.num_prompts == 6


def test_copies_of_a_prompt_share_a_cluster():
    """The standard error is that of the means over copies, and its intervals hold what they promise."""
    generator = np.random.default_rng(0)
    texts = [f"{i // 4}" for i in range(120)]
    covered = {"prompt": 0, "group": 0}
    for _ in range(400):
        rates = generator.beta(0.7, 0.7, size=30)
        rewards = (generator.random(120) < np.repeat(rates, 4)).astype(np.float64)
        rollouts = asked(texts, rewards)
        found = clustered_mean(rewards, rollouts.prompt_index, unit="reward", method="")
        by_text = rewards.reshape(30, 4).mean(1)
        assert found.stderr == pytest.approx(by_text.std(ddof=1) / np.sqrt(30), rel=1e-9)
        wrong = clustered_mean(rewards, rollouts.group_index, unit="reward", method="")
        for name, estimate in (("prompt", found), ("group", wrong)):
            covered[name] += abs(estimate.value - 0.5) < 1.96 * estimate.stderr
    assert 0.92 < covered["prompt"] / 400 < 0.98
    assert covered["group"] / 400 < 0.85


@pytest.mark.parametrize("advantages", [True, False])
def test_round_trip_is_exact(tmp_path, advantages):
    rollouts = make_rollouts(advantages=advantages)
    names = [[f"t{t}" for t in row] for row in rollouts.response_token_ids]
    rollouts.to_parquet(tmp_path / "u.parquet", tmp_path / "ut.parquet", tokens=names)
    assert_same(Rollouts.from_parquet(tmp_path / "u.parquet", tmp_path / "ut.parquet"), rollouts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u.parquet", "ut.parquet"]


def test_columns_are_those_of_the_contract(tmp_path):
    rollouts = make_rollouts()
    names = [["t"] * n for n in rollouts.num_tokens]
    weights = [np.arange(n) / 3 for n in rollouts.num_tokens]
    rollouts.to_parquet(tmp_path / "u", tmp_path / "ut", tokens=names)
    plain = RolloutTokens.read(tmp_path / "ut")
    assert plain.token_weight is None
    replace(plain, token_weight=np.concatenate(weights)).write(tmp_path / "ut")
    sequences, tokens = pq.read_table(tmp_path / "u"), pq.read_table(tmp_path / "ut")
    assert set(sequences.column_names) >= {
        "sequence_id", "prompt_id", "prompt", "response", "prompt_token_ids", "response_token_ids",
        "reward", "advantage", "num_tokens", "logprob", "entropy_mean", "truncated",
    }  # fmt: skip
    assert tokens.column_names == [
        "sequence_id", "position", "token_id", "token", "logprob", "entropy", "token_weight",
    ]  # fmt: skip
    assert tokens["sequence_id"].to_pylist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    assert tokens["position"].to_pylist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]
    assert tokens["token_weight"].to_pylist() == np.concatenate(weights).tolist()
    assert sequences["logprob"].to_pylist() == [float(v.sum()) for v in rollouts.logprobs]
    assert sequences["entropy_mean"].to_pylist() == [float(v.mean()) for v in rollouts.entropies]


def test_mismatched_tokens_are_refused_before_anything_is_written(tmp_path):
    rollouts = make_rollouts()
    with pytest.raises(BatchError, match="tokens do not match"):
        rollouts.to_parquet(tmp_path / "u", tmp_path / "ut", tokens=[["t"]] * 4)
    assert not list(tmp_path.iterdir())


def test_damaged_missing_and_foreign_files_are_refused(tmp_path):
    first, second = tmp_path / "u.parquet", tmp_path / "ut.parquet"
    with pytest.raises(RunFolderError, match="no such file"):
        Rollouts.from_parquet(first, second)
    rollouts = make_rollouts()
    names = [["t"] * n for n in rollouts.num_tokens]
    rollouts.to_parquet(first, second, tokens=names)
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match=r"u\.parquet: cannot be read"):
        Rollouts.from_parquet(first, second)
    first.write_bytes(whole)
    pq.write_table(pq.read_table(second).slice(0, 5), second)
    with pytest.raises(RunFolderError, match="different batches"):
        Rollouts.from_parquet(first, second)
    pq.write_table(pq.read_table(second).drop_columns(["entropy"]), second)
    with pytest.raises(RunFolderError, match="entropy missing"):
        Rollouts.from_parquet(first, second)


def test_fields_of_different_length_are_refused():
    rollouts = make_rollouts()
    with pytest.raises(BatchError, match="rewards has 3 entries"):
        replace(rollouts, rewards=rollouts.rewards[:3])
    with pytest.raises(BatchError, match="sequence 1 has 2 entropies for 1"):
        replace(rollouts, entropies=(rollouts.entropies[0], np.ones(2), *rollouts.entropies[2:]))
    with pytest.raises(BatchError, match="advantages has 3 entries, expected 4"):
        replace(rollouts, advantages=np.zeros(3))


def test_groups_and_selection():
    rollouts = make_rollouts()
    assert rollouts.num_prompts == 2
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 1]
    picked = rollouts.select([3, 0])
    assert picked.prompt_ids == ("a/2", "a/1")
    assert picked.prompt_index.tolist() == [0, 1]
    assert picked.num_tokens.tolist() == [2, 3]
    assert picked.advantages is not None
    assert rollouts.advantages is not None
    assert picked.advantages.tolist() == rollouts.advantages[[3, 0]].tolist()
    assert picked.entropy_per_seq[1] == rollouts.entropies[0].sum()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["rewards", "advantages", "logprobs", "entropies"])
def test_numbers_that_are_not_finite_are_refused_with_their_place(field, broken):
    rollouts = make_rollouts()
    if field in ("rewards", "advantages"):
        values, place = getattr(rollouts, field).copy(), r"sequence 2 \(a/2\)"
        values[2] = broken
    else:
        values = [row.copy() for row in getattr(rollouts, field)]
        values[2][3], place = broken, r"sequence 2 \(a/2\), response token 3"
        values = tuple(values)
    with pytest.raises(BatchError, match=f"{place}: {field} holds {broken}"):
        replace(rollouts, **{field: values}).refuse_ungraded()


def stored(tmp_path):
    rollouts = make_rollouts()
    names = [["t"] * n for n in rollouts.num_tokens]
    rollouts.to_parquet(tmp_path / "u", tmp_path / "ut", tokens=names)
    return pq.read_table(tmp_path / "u"), pq.read_table(tmp_path / "ut")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("reward", [1.0, None, 0.0, 0.0], "u: column reward holds 1 nulls"),
        ("reward", ["1", "x", "0", "0"], "u: column reward is string, expected double"),
        ("reward", [[1.0], [0.0], [0.0], [0.0]], "u: column reward is list<.*>, expected double"),
        ("advantage", [1.0, None, 0.0, 0.0], "u: advantage of sequence 1 is null and others are not"),
        ("correct", [True, None, False, True], "u: column correct holds 1 nulls"),
        ("truncated", [None] * 4, "u: column truncated holds 4 nulls"),
        ("prompt_id", ["a", "b", None, "c"], "u: column prompt_id holds 1 nulls"),
        ("num_tokens", [3.5, 1.0, 4.0, 2.0], "u: column num_tokens is double, expected int64"),
        ("response_token_ids", [[1, None, 2], [1], [1, 2, 3, 4], [1, 2]], "response_token_ids holds 1 nulls"),
        ("response_token_ids", ["a", "b", "c", "d"], "response_token_ids is string, expected list"),
    ],
)
def test_columns_of_another_kind_or_with_nulls_are_refused(tmp_path, column, values, message):
    table, _ = stored(tmp_path)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array(values)), tmp_path / "u")
    with pytest.raises(RunFolderError, match=message):
        Rollouts.from_parquet(tmp_path / "u", tmp_path / "ut")


def test_a_reward_of_nan_in_a_file_is_named(tmp_path):
    table, _ = stored(tmp_path)
    index = table.column_names.index("reward")
    pq.write_table(table.set_column(index, "reward", pa.array([1.0, 0.0, np.nan, 0.0])), tmp_path / "u")
    with pytest.raises(BatchError, match=r"sequence 2 \(a/2\): rewards holds nan"):
        Rollouts.from_parquet(tmp_path / "u", tmp_path / "ut")


def test_tokens_in_another_order_are_refused(tmp_path):
    _, tokens = stored(tmp_path)
    pq.write_table(tokens.take(list(range(tokens.num_rows))[::-1]), tmp_path / "ut")
    with pytest.raises(RunFolderError, match="ut: its rows are not in the order of the sequences of u"):
        Rollouts.from_parquet(tmp_path / "u", tmp_path / "ut")


def test_no_flipped_bit_in_the_pages_of_a_table_changes_a_number(tmp_path):
    path = tmp_path / "t.parquet"
    values = np.random.default_rng(0).normal(size=50)
    write_table(pa.table({"x": values}), path)
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    places = range(first, first + column.total_compressed_size, 3)
    noticed = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        try:
            read = read_table(path)["x"].to_numpy()
        except RunFolderError as error:
            assert "t.parquet: cannot be read as parquet" in str(error)  # noqa: PT017
            noticed += 1
        else:  # in a header, in a field that says nothing about the values
            np.testing.assert_array_equal(read, values)
    assert noticed > 0.9 * len(places)


def test_rewards_may_be_unknown_where_they_do_not_count() -> None:
    batch = make_rollouts()
    unknown = np.full(len(batch), np.nan)
    ungraded = replace(batch, rewards=unknown)
    with pytest.raises(BatchError, match="rewards holds nan, expected a finite number"):
        ungraded.refuse_ungraded()
    with pytest.raises(BatchError, match="advantages holds nan, expected a finite number"):
        replace(ungraded, advantages=unknown)
