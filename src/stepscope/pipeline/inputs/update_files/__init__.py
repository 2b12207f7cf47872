"""Update batches from what a training dumped: rows of a file, their fields, their token ids, the batch."""

from __future__ import annotations

from stepscope.pipeline.inputs.update_files.batch import GivenBatch, update_from_file
from stepscope.pipeline.inputs.update_files.rows import is_own

__all__ = ["GivenBatch", "is_own", "update_from_file"]
