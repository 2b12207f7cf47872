"""Writing a checkpoint anew in the layout of Hugging Face's Trainer, and reading it back before it counts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from stepscope.errors import CheckpointError, RunFolderError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG
from stepscope.policy.checkpoint.conversion.adapter import write_adapter
from stepscope.policy.checkpoint.conversion.state import numbered_state, same_state
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.base import Format
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.registry import checkpoint_folder, format_of, formats_in
from stepscope.policy.checkpoint.load import load_checkpoint, read_settings
from stepscope.policy.checkpoint.manifest import MANIFEST, write_manifest
from stepscope.policy.checkpoint.models import TOKENIZER_FILES, brief, quiet
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE
from stepscope.policy.checkpoint.schedule import SCHEDULER_FILE
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE
from stepscope.policy.checkpoint.trainer_log import TRAINER_STATE
from stepscope.policy.loss.settings import SETTINGS_FILE, UNKNOWN
from stepscope.policy.sampling.weights import write_merged
from stepscope.policy.state import Policy

_TOKENIZER = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*")

_CARRIED = (SETTINGS_FILE, TRAINING_ARGS_FILE, TRAINER_STATE, SCHEDULER_FILE)
"""Files that mean the same in every layout; those of the run's folder count for its checkpoints."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        formats: what the source was read as.
        written: files of the target.
        lost: what of the source the target has not, or not in the same form, a clause each.
    """

    formats: tuple[str, ...]
    written: tuple[str, ...]
    lost: tuple[str, ...]


@reads_foreign
def convert(source: Path, target: Path) -> Converted:
    """Write a checkpoint in the plain layout: weights, moments, number of steps, settings.

    The target is read back and compared with the source to the bit before it gets its name, so about twice
    the memory of the checkpoint is needed. A source in the plain layout is copied as it is.

    Args:
        source: a checkpoint of any format.
        target: a folder that is not there yet, outside of the source.

    Raises:
        RunFolderError: the target is there, inside of the source, or cannot be written.
        CheckpointError: the source cannot be read, or what was written is not what was read.

    Pinned by ``tests/policy/test_convert.py``.
    """
    folder, target = _apart(source, target)
    formats = formats_in(folder)
    with _arriving(target) as partial:
        if [type(known) for known in formats] == [Plain]:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            lost: list[str] = []
        else:
            lost = _written(folder, partial) + _left(folder, formats)
            write_manifest(partial)
        files = sorted(f.relative_to(partial).as_posix() for f in partial.rglob("*") if f.is_file())
    return Converted(tuple(known.name for known in formats), tuple(files), tuple(lost))


@reads_foreign
def merge(source: Path, target: Path) -> tuple[str, ...]:
    """Write weights and tokenizer alone, adapters merged, for an inference engine to load.

    Args:
        source: a checkpoint of any format.
        target: a folder that is not there yet, outside of the source.

    Returns:
        Files of the target.

    Raises:
        RunFolderError: the target is there, inside of the source, or cannot be written.
        CheckpointError: the source cannot be read.
    """
    folder, target = _apart(source, target)
    precision = _precision(format_of(folder, "weights").stored_types(folder))
    policy = load_checkpoint(
        folder, precision=precision, device="cpu", settings=UNKNOWN, require_optimizer=False
    )
    with _arriving(target) as partial, quiet(), _writing(partial):
        write_merged(policy, partial)
        return tuple(sorted(f.name for f in partial.iterdir()))


def _apart(source: Path, target: Path) -> tuple[Path, Path]:
    """The checkpoint's folder, and a target that is new and outside of it."""
    folder = checkpoint_folder(source.expanduser())
    target = target.expanduser()
    if target.exists() or target.is_symlink():
        raise RunFolderError(f"{target}: is there already; give a new folder, or remove it")
    if target.resolve().is_relative_to(folder.resolve()):
        raise RunFolderError(f"{target}: is inside of the checkpoint {folder}; give a folder outside of it")
    return folder, target


def _written(folder: Path, partial: Path) -> list[str]:
    """Write all parts, read them back, and say what is lost."""
    precision = _precision(format_of(folder, "weights").stored_types(folder))
    policy = load_checkpoint(folder, precision=precision, device="cpu", settings=UNKNOWN, keep_source=True)
    assert policy.optimizer is not None
    assert policy.optimizer.source is not None
    model: Any = policy.model
    state, lost = numbered_state(policy.optimizer.source, model)
    with quiet(), _writing(partial):
        if isinstance(model, PeftModel):
            lost += write_adapter(model, folder, partial, _half(policy))
        else:
            model.save_pretrained(partial)
        _write_tokenizer(policy.tokenizer, partial)
        torch.save(state, partial / OPTIMIZER_FILE)
    for name in _CARRIED:
        places = (folder,) if name == TRAINER_STATE else (folder, folder.parent)
        for place in places:
            if (place / name).is_file() and not (partial / name).is_file():
                shutil.copyfile(place / name, partial / name)
    if not (partial / TRAINER_STATE).is_file():
        (partial / TRAINER_STATE).write_text(json.dumps({"global_step": policy.step}), encoding="utf-8")
        lost.append("the Trainer's log: the source has only a number of steps")
    if not (partial / SCHEDULER_FILE).is_file():
        lost.append(
            "the state of a scheduler: none is there, and the next learning rate is that of the groups"
        )
    if (types := policy.stored_dtypes) != (precision,):
        lost.append(
            f"the types of the weights: {'/'.join(types)} are written as {precision}, without rounding"
        )
    lost += _settings(folder, partial)
    _verify(policy, partial, precision)
    return lost


def _write_tokenizer(tokenizer: Any, partial: Path) -> None:
    """The files that it came from, which say more than the object; of a tokenizer from the hub, its own."""
    source = Path(str(tokenizer.name_or_path))
    if not source.is_dir():
        tokenizer.save_pretrained(partial)
        return
    for file in {file for pattern in _TOKENIZER for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, partial / file.name)


def _precision(types: tuple[str, ...]) -> str:
    """The type that holds all stored weights as they are."""
    if "float64" in types:
        return "float64"
    return "bfloat16" if types == ("bfloat16",) else "float32"


def _half(policy: Policy) -> torch.dtype | None:
    """The half type of an adapter's weights, which PEFT widens on loading."""
    return torch.bfloat16 if policy.stored_dtypes == ("bfloat16",) else None


def _settings(folder: Path, partial: Path) -> list[str]:
    """Settings as the source's format reads them, in a file of their own where those copied say others."""
    copied = any((partial / name).is_file() for name in (SETTINGS_FILE, TRAINING_ARGS_FILE))
    try:
        known = read_settings(folder)
    except CheckpointError:
        return (
            [] if copied else ["the settings of the loss: nothing says them; give loss.KEY=VALUE to measure"]
        )
    try:
        if read_settings(partial) == known:
            return []
    except CheckpointError:
        pass
    known.save(partial)
    return [f"settings that only the source's format has: {SETTINGS_FILE} has all of them"] if copied else []


def _verify(policy: Policy, partial: Path, precision: str) -> None:
    """Read what was written and compare it with what was read, to the bit."""
    assert policy.optimizer is not None
    assert policy.optimizer.source is not None
    try:
        again = load_checkpoint(
            partial, precision=precision, device="cpu", settings=UNKNOWN, keep_source=True
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{policy.path}: written anew it does not load ({error}); measure it as it is, and report its "
            "format"
        ) from error
    assert again.optimizer is not None
    assert again.optimizer.source is not None
    before, after = dict(policy.model.named_parameters()), dict(again.model.named_parameters())
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise _differs(policy, name)
    old, new = policy.optimizer.source.entries, again.optimizer.source.entries
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or not same_state(old[name], new[name]):
            raise _differs(policy, f"the state of {name}")
    settings = [
        {name: {**vars(group), "names": ()} for group in each.optimizer.groups for name in group.names}
        for each in (policy, again)
        if each.optimizer is not None
    ]
    if settings[0] != settings[1] or policy.step != again.step:
        raise _differs(policy, "the groups' settings or the number of steps")


def _differs(policy: Policy, what: str) -> CheckpointError:
    return CheckpointError(
        f"{policy.path}: written anew, {what} is not what it was, so nothing is left of that; measure the "
        "checkpoint as it is, and report its format"
    )


def _left(folder: Path, formats: list[Format]) -> list[str]:
    """Files of the source that no part of the target comes from."""
    read = {f for known in formats for p in (*known.tensors, *known.configs) for f in folder.glob(p)}
    known = (*_CARRIED, MANIFEST, ADAPTER_CONFIG)
    others = [
        f.relative_to(folder).as_posix()
        for f in sorted(folder.iterdir())
        if f.is_file() and f not in read and f.name not in known and not f.name.endswith((".json", ".jinja"))
    ]
    return [f"{', '.join(others[:8])}{' and more' if others[8:] else ''}"] if others else []


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Inside the block a failure of torch's and safetensors' writers is one of the target's disk."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free
        raise RunFolderError(
            f"{folder.parent}: the target cannot be written there, {free} bytes are free ({brief(error)}); "
            "make room on the disk, then run again"
        ) from error


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes it at the end of the block, and is gone after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
