"""``stepscope convert``: a checkpoint of any format in the layout of Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path


def run_convert(source: Path, target: Path, *, merged: bool = False) -> None:
    """Write the checkpoint anew and say what was written and what of it is lost.

    Args:
        source: a checkpoint of any format.
        target: a folder that is not there yet.
        merged: weights alone, adapters merged, for an inference engine.

    Raises:
        RunFolderError: the target is there.
        CheckpointError: the source cannot be read, or what was written is not what was read.
    """
    from stepscope.policy.checkpoint.conversion.convert import convert, merge

    if merged:
        print(f"written: {target}: {', '.join(merge(source, target))}")
        return
    done = convert(source, target)
    print(f"read as {' and '.join(done.formats)}")
    print(f"written: {target}: {', '.join(done.written)}")
    for clause in done.lost:
        print(f"not carried over: {clause}")
