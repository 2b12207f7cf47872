"""Tables on disk: parquet that appears whole or not at all, every page with a checksum."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stepscope.errors import RunFolderError


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as parquet with a checksum for every page; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, write_page_checksum=True)
    partial.replace(path)


def read_table(path: Path) -> pa.Table:
    """Read a parquet file, its pages verified where they have checksums.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise RunFolderError(f"{path}: cannot be read as parquet ({reason}); write it again") from error
