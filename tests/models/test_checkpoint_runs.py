"""Runs of a checkpoint of each architecture: on text, with another router, of a recording, decoding, and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moe_lab
from moe_lab.records.schema import Record
from moe_lab.records.trace import Trace
from tests import quick
from tests.models.checkpoints import KINDS, checkpoint

_FAST = {"lfm2_moe"}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind, marks=[pytest.mark.slow] * (kind not in _FAST)) for kind in KINDS]
)


def ran(folder: Path, name: str, *overrides: str) -> Record:
    """A verified run of the checkpoint in this folder."""
    cfg = quick.compose("checkpoint", f"model.path={folder / 'c'}", *overrides)
    record: Record = moe_lab.run(cfg, folder / name)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    return record


@pytest.mark.slow
@kinds
def test_routers_are_swapped_on_text(kind: str, tmp_path: Path) -> None:
    """The quality of both is known, and what the native one chose is replayed."""
    checkpoint(kind, tmp_path / "c", vocab_size=256)
    recorded = "measure.record_routing=true"
    native = ran(tmp_path, "native", recorded)
    swapped = ran(tmp_path, "swapped", "router=sinkhorn")
    assert native.quality is not None and swapped.quality is not None
    assert native.quality["kl_to_native"] == 0 < swapped.quality["kl_to_native"]
    ran(tmp_path, "replayed", "workload.load=replay", f"workload.trace={tmp_path / 'native'}", recorded)
    with (
        Trace(tmp_path / "native" / "routes.trace") as first,
        Trace(tmp_path / "replayed" / "routes.trace") as again,
    ):
        assert first.layers == again.layers
        for index in range(len(first.layers)):
            assert np.array_equal(first.ids(index), again.ids(index))


@kinds
def test_tokens_are_decoded_in_bf16(kind: str, tmp_path: Path) -> None:
    """Every step is compared with a pass without a cache."""
    checkpoint(kind, tmp_path / "c", vocab_size=256)
    phase = ("workload.phase=decode", "workload.context_len=9", "seq_len=5", "dtype=bf16")
    record = ran(tmp_path, "run", *phase)
    assert record.memory is not None and record.memory["cache_bytes_per_token"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["cuda_graph", "compile"])
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in KINDS])
def test_a_gpu_decodes_and_passes_forward(kind: str, execution: str, tmp_path: Path) -> None:
    """The states in the cache, sinks, gates and biases of each family, in a captured graph and compiled."""
    checkpoint(kind, tmp_path / "c", vocab_size=256)
    near_ties = (kind, execution) == ("mistral4", "compile")  # of these few numbers in bf16
    dtype = "fp16" if near_ties else "bf16"
    on_gpu = ("device=cuda", f"dtype={dtype}", f"execution={execution}")
    phase = ("workload.phase=decode", "workload.context_len=9", "seq_len=5")
    ran(tmp_path, "decode", *phase, *on_gpu)
    ran(tmp_path, "forward", *on_gpu)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in KINDS])
def test_it_is_exported(kind: str, tmp_path: Path) -> None:
    """As an ONNX pair, which ONNX Runtime computes as the run did."""
    pytest.importorskip("onnxruntime")
    checkpoint(kind, tmp_path / "c", vocab_size=256)
    record = ran(tmp_path, "run", "export=netron")
    assert record.export is not None and record.export["parity"]["status"] == "passed"
