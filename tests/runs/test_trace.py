"""runs/trace.py: a trace has what the model chose for each token of each text, prefilled and decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lab.measure.tolerances import exact_products
from moe_lab.models.moe_layer import moe_layers
from moe_lab.records.trace import PHASES, Trace
from moe_lab.runs import build
from moe_lab.runs.trace import boundary_margin, record
from moe_lab.workloads import text
from tests import quick


def recorded(path: Path, *more: str, logits: bool = False, n_tokens: int | None = 128) -> tuple[Trace, list[str]]:
    cfg = quick.compose("checkpoint", *more)
    missing = record(cfg, path, n_tokens, logits=logits)
    return Trace(path), missing


def test_a_trace_has_the_models_own_routes(tmp_path: Path) -> None:
    """Ids, weights and logits of a pass over the same windows, and the windows' texts."""
    trace, missing = recorded(tmp_path / "x.trace", logits=True)
    cfg = quick.compose("checkpoint")
    model = build.build_model(cfg)
    windows = text.windows(text.read_domains(cfg.workload.path, 256, None), 16, 8, 0)
    with trace, exact_products(), torch.inference_mode():
        tokens = trace.tokens()
        assert trace.n_tokens == 128 and trace.domains == windows.names and not missing
        assert np.array_equal(tokens.token.reshape(8, 16), windows.ids_WS.numpy())
        assert np.array_equal(tokens.sequence, np.arange(8).repeat(16))
        assert np.array_equal(tokens.position, np.tile(np.arange(16), 8))
        assert np.array_equal(tokens.domain, windows.domain_W.numpy().repeat(16))
        assert {PHASES[phase] for phase in tokens.phase} == {"prefill"}
        for first in range(0, 8, 2):
            routings, rows = model(windows.ids_WS[first : first + 2]).routings, slice(first * 16, first * 16 + 32)
            for index, routing in enumerate(routings):
                assert np.array_equal(trace.ids(index)[rows], routing.expert_ids_TK.numpy())
                weights_TK = np.concatenate(list(trace.pieces_of(index, "weights")))[rows]
                assert np.array_equal(weights_TK, routing.weights_TK.numpy())
        logits_TE, margin_T = (torch.from_numpy(next(trace.pieces_of(0, name))) for name in ("logits", "margin"))
        assert torch.equal(
            logits_TE.topk(2).indices.sort().values.int(), torch.from_numpy(trace.ids(0)).sort().values.int()
        )
        assert torch.equal(margin_T, boundary_margin(logits_TE, 2)) and margin_T.min() >= 0
        sizes = [(layer.weights.n_experts, layer.weights.bytes_per_expert) for layer in moe_layers(model)]
        assert [(layer.n_experts, layer.bytes_per_expert) for layer in trace.layers] == sizes
    assert trace.source["texts"] and trace.source["router"] == "native" and trace.source["model"] == "tiny-olmoe"


def test_the_likeliest_next_tokens_are_recorded(tmp_path: Path) -> None:
    """Those of the model's logits; of a context's tokens none is computed, which is said."""
    cfg = quick.compose("checkpoint")
    record(cfg, tmp_path / "x.trace", 64, predicted=True)
    ids_WS = text.windows(text.read_domains(cfg.workload.path, 256, None), 16, 4, 0).ids_WS
    with Trace(tmp_path / "x.trace") as trace, exact_products(), torch.inference_mode():
        predicted_T = trace.of_tokens("predicted")
        assert np.array_equal(predicted_T, build.build_model(cfg)(ids_WS).y.argmax(-1).flatten().numpy())
    decode = quick.compose("checkpoint", "workload.phase=decode", "workload.context_len=11", "seq_len=5")
    missing = record(decode, tmp_path / "y.trace", 64, predicted=True)
    with Trace(tmp_path / "y.trace") as trace:
        tokens = trace.tokens()
        order, is_decoded = np.lexsort((tokens.position, tokens.sequence)), tokens.phase == PHASES.index("decode")
        assert (trace.of_tokens("predicted")[~is_decoded] == -1).all()
        same_T = trace.of_tokens("predicted")[order] == predicted_T
        assert same_T[is_decoded[order]].mean() > 0.95 and any("of the contexts' tokens" in text for text in missing)


def test_decoded_tokens_are_told_from_prefilled_ones(tmp_path: Path) -> None:
    """The routes are those of the whole pass, in the order of the steps."""
    decode = ("workload.phase=decode", "workload.context_len=11", "seq_len=5")
    trace, _ = recorded(tmp_path / "x.trace", *decode, n_tokens=64)
    whole, _ = recorded(tmp_path / "y.trace", n_tokens=64)
    with trace, whole:
        tokens, of_whole = trace.tokens(), whole.tokens()
        assert (tokens.phase == PHASES.index("decode")).sum() == 4 * 5 and trace.n_tokens == 64
        assert tokens.position[22:32].tolist() == [11, 11, 12, 12, 13, 13, 14, 14, 15, 15]
        assert tokens.sequence[22:26].tolist() == [0, 1, 0, 1]
        order = np.lexsort((tokens.position, tokens.sequence))
        assert np.array_equal(tokens.token[order], of_whole.token)
        same = np.mean([np.mean(trace.ids(i)[order] == whole.ids(i)) for i in range(len(whole.layers))])
        assert same > 0.98  # a near-tie may be decided otherwise


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Windows that do not fill a batch, and texts that are too short."""
    for name, n in (("long", 70), ("short", 5)):
        (tmp_path / f"{name}.txt").write_text("x" * n)
    trace, missing = recorded(tmp_path / "x.trace", f"workload.path={tmp_path}", "batch=3", n_tokens=None)
    with trace:
        assert trace.n_tokens == 48 and list(trace.missing) == missing
    assert missing == [
        "short: shorter than one window (seq_len tokens)",
        "the last window, which does not fill a batch",
    ]


def test_random_ids_are_recorded_as_what_they_are(tmp_path: Path) -> None:
    """Of no text."""
    trace, _ = recorded(tmp_path / "x.trace", "workload.ids=uniform", n_tokens=1024)
    with trace:
        assert trace.domains == ("uniform",) and set(trace.tokens().domain) == {0}
        assert len(np.unique(trace.tokens().token)) > 200


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["workload.load=balanced"], "are the router's own choice here", id="load"),
        pytest.param(["seq_len=100000"], "needs a text of at least|supports at most", id="long"),
    ],
)
def test_what_cannot_be_recorded_is_said(more: list[str], message: str, tmp_path: Path) -> None:
    """Nothing is written."""
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path / "x.trace", *more)
    with pytest.raises(ValueError, match=r"^workload.prefill_chunk=3: windows and contexts are computed as a whole"):
        record(quick.compose("checkpoint", "workload.phase=prefill", "workload.prefill_chunk=3"), tmp_path / "x.trace")
    with pytest.raises(ValueError, match="needs real text"):
        record(quick.compose("decoder_moe"), tmp_path / "x.trace")
    assert not list(tmp_path.iterdir())


def test_a_router_without_a_fixed_k_has_room_for_all(tmp_path: Path) -> None:
    """Unused slots are -1."""
    trace, _ = recorded(tmp_path / "x.trace", "router=expert_choice", n_tokens=32)
    with trace:
        assert trace.layers[0].top_k == trace.layers[0].n_experts == 16
        assert trace.ids(0).min() == -1 and (trace.ids(0) >= 0).sum() == 2 * 32


def test_the_margin_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: the second and the third are 1/8 apart."""
    logits_TE = torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log()
    assert boundary_margin(logits_TE, 2).tolist() == pytest.approx([0.125])
    assert boundary_margin(logits_TE, 4).isnan().all()
