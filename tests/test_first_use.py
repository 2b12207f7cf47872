"""Libraries are loaded with the garbage collector at rest and without other people's complaints."""

from __future__ import annotations

import gc
import logging

import pytest

import stepscope
from stepscope.first_use import loading


def test_the_collector_rests_and_goes_on() -> None:
    assert gc.isenabled()
    with loading():
        assert not gc.isenabled()
        with loading():
            pass
        assert not gc.isenabled(), "the inner block leaves it as it was"
    assert gc.isenabled()
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()


def test_only_a_process_of_its_own_sets_objects_apart() -> None:
    before = gc.get_freeze_count()
    with loading():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() == before
    with loading(to_stay=True):
        made += [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + 2000


def test_bitsandbytes_does_not_complain_of_kernels_while_it_is_loaded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so from Python, too: the package loads its names so, each once."""
    talker = logging.getLogger("bitsandbytes.backends.cpu")

    def load(name: str) -> str:
        talker.warning("Failed to load CPU gemm_4bit_forward")
        return name

    monkeypatch.setattr(stepscope, "_load", load)
    assert stepscope.__getattr__("load_checkpoint") == "load_checkpoint"
    assert not caplog.records
    talker.warning("of the user's own quantized model")
    assert [record.message for record in caplog.records] == ["of the user's own quantized model"]
