"""Real artifacts of a small measurement, each read by the class that wrote it."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import pkgutil
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import damage, few
from stepscope import results, runs
from stepscope.errors import RunFolderError
from stepscope.pipeline.stages import PLANS
from stepscope.reading.measurement import Measurement, load_measurement
from stepscope.results import (
    Record,
    Rollouts,
    RolloutTokens,
    Table,
    read_arrays,
    read_table,
    write_arrays,
    write_table,
)
from stepscope.results.change import Change, Changes, Taken
from stepscope.results.criteria import Criteria, CriteriaTokens, Pareto
from stepscope.results.curvature import CurvatureReport
from stepscope.results.frontier import Frontier
from stepscope.results.influence import (
    InfluenceSequences,
    InfluenceTokenFolds,
    InfluenceTokens,
    Reliabilities,
)
from stepscope.results.kernel import KernelReport
from stepscope.results.kinship import StepKinship
from stepscope.results.mismatch import SamplerReport
from stepscope.results.models import ModelsReport
from stepscope.results.noise import NoiseScales
from stepscope.results.step import Rounding, Routing, StepReport, Storage, StoredTensor
from stepscope.results.summary import Summary
from stepscope.results.validation import Validations

RECORDS: dict[str, type[Record]] = {
    "summary.json": Summary,
    "step.json": StepReport,
    "change.json": Changes,
    "reliability.json": Reliabilities,
    "validation.json": Validations,
    "kernel.json": KernelReport,
    "models.json": ModelsReport,
    "curvature.json": CurvatureReport,
    "kinship.json": StepKinship,
    "noise.json": NoiseScales,
    "sampler.json": SamplerReport,
    "criteria.json": Criteria,
    "pareto.json": Pareto,
    "frontier.json": Frontier,
}
TABLES: dict[str, type[Table]] = {
    "update_tokens.parquet": RolloutTokens,
    "probe_tokens.parquet": RolloutTokens,
    "influence_sequences.parquet": InfluenceSequences,
    "influence_tokens.parquet": InfluenceTokens,
    "influence_token_folds.parquet": InfluenceTokenFolds,
    "criteria_tokens.parquet": CriteriaTokens,
}
OTHERS = {
    "config.yaml",
    "provenance.json",
    "report.html",
    "update.parquet",
    "probe.parquet",
    "direction.safetensors",
    "kernel.safetensors",
    "curvature.safetensors",
}


def subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def parts(value: Any) -> Iterator[Record]:
    """All records in a record."""
    if isinstance(value, Record):
        yield value
    if is_dataclass(value):
        for field in fields(value):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from parts(item)


@pytest.fixture(scope="module")
def found(tiny_measurement: Path) -> Measurement:
    return load_measurement(tiny_measurement)


@pytest.fixture
def copy(tiny_measurement: Path, tmp_path: Path) -> Path:
    """A copy whose files no digest vouches for."""
    folder = tmp_path / "step-4"
    shutil.copytree(tiny_measurement, folder)
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["sealed"] = {}
    for stage in provenance["stages"].values():
        stage["sha256"] = {}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_every_artifact_has_a_class(tiny_measurement: Path) -> None:
    assert {p.name for p in tiny_measurement.iterdir()} == {*RECORDS, *TABLES, *OTHERS}
    assert {file for plan in PLANS.values() for file in plan.writes} <= {*RECORDS, *TABLES, *OTHERS}


def test_every_record_comes_back_as_it_stands_in_its_file(tiny_measurement: Path) -> None:
    seen: set[type] = set()
    for name, kind in RECORDS.items():
        path = tiny_measurement / name
        record = runs.read_record(kind, path)
        assert record.to_json() == path.read_text(), name
        for part in parts(record):
            seen.add(type(part))
            again = type(part).from_plain(part.to_plain(), name)
            assert again.to_plain() == part.to_plain(), type(part).__name__
            assert type(part).__name__ in repr(part)
            assert "<table>" in part._repr_html_()
    for module in pkgutil.iter_modules(results.__path__):
        importlib.import_module(f"stepscope.results.{module.name}")
    known = {
        kind
        for kind in subclasses(Record)
        if is_dataclass(kind) and kind.__module__.startswith("stepscope.results")
    }
    others = ("study", "evaluation", "entropy_law", "mismatch", "profile", "recording")
    others += ("ledger", "kinship", "what_if")
    elsewhere = {k for k in known if k.__module__.rsplit(".", 1)[1] in others}
    special = {Rounding, Taken, Storage, StoredTensor, Routing}
    assert known - elsewhere - seen <= special, (
        "half types, moments in 8 bits and experts have tests of their own"
    )


@pytest.mark.parametrize("name", TABLES)
def test_every_table_comes_back_as_it_stands_in_its_file(tiny_measurement: Path, name: str) -> None:
    table = runs.read_record(TABLES[name], tiny_measurement / name)
    stored = pq.read_table(tiny_measurement / name)
    assert table.to_arrow().schema.equals(stored.schema, check_metadata=True)
    frame = table.to_pandas()
    assert frame.equals(stored.to_pandas())
    assert len(frame) == len(table)
    assert "<table" in table._repr_html_()


def test_a_measurement_is_read_back(found: Measurement, tiny_measurement: Path) -> None:
    assert found.checkpoint_step == 4
    assert found.summary["change_true_per_token"].unit == "nats/token"
    assert found.change is not None
    own = found.change.at(found.change.lr)
    assert own.true == found.summary["change_true_per_token"]
    assert {series.version for series in found.change.series} == {"on_policy", "fixed_prefix"}
    assert all(type(series) is Change for series in found.change.others)
    assert found.step is not None
    assert found.step.components["momentum"].share == found.summary["share_momentum"].value
    assert sum(part.share for part in found.step.components.values()) == pytest.approx(1.0)
    direction = found.direction()
    assert direction is not None
    assert math.sqrt(sum(float((v**2).sum()) for v in direction.values())) == pytest.approx(
        found.step.norm_direction
    )
    assert isinstance(found.update, Rollouts)
    assert isinstance(found.probe, Rollouts)
    assert len(found.update) == 16
    tokens, sequences = found.influence_tokens, found.influence_sequences
    assert tokens is not None
    assert sequences is not None
    fixed = tokens.where((tokens.through == "fixed") & (tokens.quantity == "entropy"))
    whole = sequences.where(
        (sequences.component == "sequence")
        & (sequences.through == "fixed")
        & (sequences.quantity == "entropy")
    )
    sums = np.bincount(fixed.sequence_id, weights=fixed.influence)
    np.testing.assert_allclose(sums, whole.influence)
    assert whole.sequence_id.tolist() == list(range(16))
    assert found.update_tokens is not None
    assert found.update_tokens.token_weight is not None
    assert found.probe_tokens is not None
    assert found.probe_tokens.token_weight is None
    assert found.kernel is not None
    matrices = found.kernel_matrices("update_raw", "none such")
    assert matrices is not None
    assert {name: K.shape for name, K in matrices.items()} == {"update_raw": (16, 16)}
    assert found.noise is not None
    assert found.noise.noise_scale.unit == "prompts"
    assert found.validation is not None
    assert set(found.validation) == {"zeroed", "zeroed_optimizer", "recomputed", "recomputed_optimizer"}
    assert found.criteria is not None
    assert found.pareto is not None
    assert found.reliability is not None
    assert found.config is not None
    assert found.provenance is not None
    assert "Entropy of the policy, per token" in found._repr_html_()


GIVEN = {"path", "summary", "stored", "quantity", "plot", "show", "to_pandas"}


def test_what_no_stage_wrote_is_none(copy: Path) -> None:
    for name in (*RECORDS, *TABLES, *OTHERS):
        if name != "summary.json":
            (copy / name).unlink()
    found = load_measurement(copy)
    names = [n for n in dir(Measurement) if not n.startswith("_") and n not in GIVEN]
    values = [getattr(found, n) for n in names if n != "checkpoint_step"]
    assert all((value() if callable(value) else value) is None for value in values)
    (copy / "summary.json").unlink()
    with pytest.raises(RunFolderError, match="not a finished measurement"):
        load_measurement(copy)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_something_else_is_one_error(copy: Path, name: str) -> None:
    path = copy / name
    plain = json.loads(path.read_text())
    odd = [{}, [], {"format_version": 1}, plain | {"more": 1}, dict.fromkeys(plain)]
    odd += [{k: v for k, v in plain.items() if k != key} for key in plain]
    if "format_version" in plain:
        odd.append(plain | {"format_version": 99})
    if "format_version" not in plain:  # a mapping may have any keys
        odd = [[], {"more": 1}, dict.fromkeys(plain)]
    for content in odd:
        path.write_text(json.dumps(content))
        with pytest.raises(RunFolderError) as error:
            runs.read_record(RECORDS[name], path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_something_else_is_one_error(copy: Path, name: str) -> None:
    path = copy / name
    table = read_table(path)
    metadata = table.schema.metadata
    odd = [table.replace_schema_metadata({}), table.replace_schema_metadata({"format_version": "99"})]
    for index, column in enumerate(table.column_names):
        values = [{"a": 1}] * table.num_rows
        odd.append(table.set_column(index, column, [values]).replace_schema_metadata(metadata))
        if column not in ("sequence_id", "token_weight"):
            nulls = [[None] * table.num_rows]
            odd.append(table.set_column(index, column, nulls).replace_schema_metadata(metadata))
    for content in odd:
        write_table(content, path)
        with pytest.raises(RunFolderError, match=name) as error:
            runs.read_record(TABLES[name], path)
        assert "\n" not in str(error.value)


def test_arrays_of_something_else_are_one_error(copy: Path, tmp_path: Path) -> None:
    path = copy / "kernel.safetensors"
    arrays = read_arrays(path)
    write_arrays(arrays, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    content = path.read_bytes()
    for odd in (b"", content[:100], content.replace(b'"format_version":"1"', b'"format_version":"2"')):
        path.write_bytes(odd)
        with pytest.raises(RunFolderError, match=r"kernel\.safetensors"):
            read_arrays(path)


def test_a_folder_of_another_version_is_refused(copy: Path) -> None:
    path = copy / "provenance.json"
    provenance = json.loads(path.read_text())
    path.write_text(json.dumps(provenance | {"format_version": 0}))
    with pytest.raises(RunFolderError, match="format_version 0, and this stepscope reads version 1"):
        load_measurement(copy)


@pytest.mark.parametrize("examples", [pytest.param(60, id="few"), pytest.param(3000, marks=pytest.mark.slow)])
def test_no_damage_is_another_error(copy: Path, tmp_path: Path, examples: int) -> None:
    names = [n for n in dir(Measurement) if not n.startswith("_") and n != "stored"]

    @few(examples)
    @given(name=st.sampled_from(sorted({*RECORDS, *TABLES, *OTHERS} - {"report.html"})), data=st.data())
    def hurt(name: str, data: st.DataObject) -> None:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(copy, folder)
        damage(folder / name, data.draw)
        with contextlib.suppress(RunFolderError):
            found = load_measurement(folder)
            values = [getattr(found, n) for n in names]
            assert len([value() if callable(value) else value for value in values]) == len(names)

    hurt()
