"""Frozen result records shared by all layers, and how they are stored; plain numpy, no torch.

Axes are named ``prompt, seq, tok, vocab, lr``. Ragged token data are tuples with one array per sequence.
"""

from __future__ import annotations

from stepscope.results.arrays import read_arrays, write_arrays
from stepscope.results.brief import Brief
from stepscope.results.records import BoolArray, FloatArray, IntArray, Record
from stepscope.results.rollout_tokens import RolloutTokens
from stepscope.results.rollouts import Rollouts, same_text
from stepscope.results.tables import Table, read_table, write_table

__all__ = [
    "BoolArray",
    "Brief",
    "FloatArray",
    "IntArray",
    "Record",
    "RolloutTokens",
    "Rollouts",
    "Table",
    "read_arrays",
    "read_table",
    "same_text",
    "write_arrays",
    "write_table",
]
