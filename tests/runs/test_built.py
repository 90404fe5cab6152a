"""runs/built.py: what a step computes and who computes it."""

from __future__ import annotations

import pytest
import torch

from tests import tiny

STEPS = 7


@pytest.mark.parametrize(
    ("most", "positions"),
    [
        pytest.param(None, (0, 1, 2, 3, 4, 5, 6), id="all"),
        pytest.param(3, (0, 2, 4), id="some"),
        pytest.param(99, (0, 1, 2, 3, 4, 5, 6), id="more than there are"),
    ],
)
def test_outputs_of_decoding_are_evenly_spread_steps(most: int | None, positions: tuple[int, ...]) -> None:
    """Each is what the step at that position computes."""
    built = tiny.built(tiny.decoder_moe("workload.phase=decode", f"seq_len={STEPS}", "workload.context_len=2")).built
    every = [output.y.clone() for output in built.outputs()]
    chosen = [output.y.clone() for output in built.outputs(most)]
    assert len(every) == STEPS and len(chosen) == len(positions)
    assert all(torch.equal(y, every[position]) for y, position in zip(chosen, positions, strict=True))


def test_a_pass_is_one_output() -> None:
    """Whatever is asked for."""
    built = tiny.built(tiny.decoder_moe()).built
    (output,) = built.outputs(3)
    assert torch.equal(output.y, built.model(built.x).y)


def test_who_computes_what() -> None:
    """Each part once; a model without experts has neither router nor experts, and no properties of a router."""
    experts = tiny.built(tiny.decoder_moe("experts=loop")).built
    assert experts.implementation().items() >= {"router": "torch", "experts": "loop"}.items()
    assert experts.router_properties() is not None
    dense = tiny.built(tiny.transformer_decoder()).built
    assert (
        dense.implementation() == {"add_rms_norm": "torch", "attention": "torch:flash"}
        and dense.router_properties() is None
    )
    forced = tiny.built(tiny.decoder_moe("workload.load=balanced")).built
    assert forced.implementation()["router"] == "forced: balanced"


@pytest.mark.parametrize(
    ("more", "attention"),
    [
        pytest.param((), "torch:flash", id="auto"),
        pytest.param(("model.attention=math",), "torch:math", id="named"),
        pytest.param(("model.attention=math", "workload.phase=prefill"), "torch:math", id="prefill"),
        pytest.param(("workload.phase=prefill", "workload.prefill_chunk=3"), "torch:flash", id="chunks"),
        pytest.param(("workload.phase=prefill", "seq_len=1"), None, id="one token"),
        pytest.param(("workload.phase=decode",), "torch", id="decode"),
    ],
)
def test_who_computes_attention(more: tuple[str, ...], attention: str | None) -> None:
    """Of many tokens torch's backend; one token has no choice."""
    assert tiny.built(tiny.decoder_moe(*more)).built.implementation().get("attention") == attention
