"""models/checkpoint_rope.py: what a config.json says of RoPE is what transformers reads, or it is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.models.checkpoint_keys import Keys
from moe_lab.models.checkpoint_rope import read_rope
from moe_lab.models.rope import frequencies
from tests.models.checkpoints import complaint

LENGTH, HEAD_DIM = 128, 16
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 0.5, "high_freq_factor": 6.0}


def keys(**content: Any) -> Keys:
    return Keys(Path("config.json"), {"max_position_embeddings": LENGTH, **content})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"rope_theta": 500}, id="theta"),
        pytest.param({"rope_theta": 1e4, "rope_parameters": {**DEFAULT, "rope_theta": 5e5}}, id="theta_inside_counts"),
        pytest.param({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, id="theta_beside"),
        pytest.param({"rope_theta": 1e4, "rope_parameters": DEFAULT, "rope_scaling": YARN}, id="yarn_beside_default"),
        pytest.param({"rope_parameters": {}, "rope_scaling": YARN}, id="yarn_beside_empty"),
        pytest.param({"rope_parameters": None, "rope_scaling": YARN}, id="yarn_beside_null"),
        pytest.param({"rope_parameters": YARN, "rope_scaling": {}}, id="empty_beside_yarn"),
        pytest.param({"rope_parameters": YARN, "rope_scaling": YARN}, id="yarn_twice"),
        pytest.param(
            {"rope_parameters": {**YARN, "rope_theta": 9.0}, "rope_scaling": YARN, "rope_theta": 9.0}, id="agree"
        ),
        pytest.param({"rope_scaling": {**YARN, "rope_theta": 900.0}, "rope_theta": 1e4}, id="theta_in_the_scaling"),
        pytest.param({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "llama3"}}, id="llama3_and_its_name"),
        pytest.param({"rope_scaling": LINEAR, "rope_theta": 50.0}, id="linear"),
        pytest.param({"rope_scaling": YARN, "original_max_position_embeddings": 64}, id="length_beside_counts"),
        pytest.param({"rope_scaling": {**YARN, "factor": None}}, id="factor_from_the_lengths"),
        pytest.param(
            {"rope_scaling": {**YARN, "factor": None}, "original_max_position_embeddings": 16},
            id="factor_from_the_length_beside",
        ),
        pytest.param({"rope_scaling": {"type": "yarn", "factor": 4.0}}, id="length_from_the_longest"),
        pytest.param({"rope_scaling": {**YARN, "original_max_position_embeddings": 4}}, id="yarn_very_short"),
        pytest.param({"rope_scaling": {**YARN, "original_max_position_embeddings": 10**6}}, id="yarn_very_long"),
        pytest.param({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}, id="yarn_betas_swapped"),
        pytest.param({"rope_scaling": {**YARN, "truncate": False, "beta_fast": 2}}, id="yarn_not_truncated"),
        pytest.param({"rope_scaling": {**YARN, "attention_factor": 0.5}}, id="yarn_attention_factor"),
        pytest.param({"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}, id="yarn_mscales"),
    ],
)
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("olmoe", "mixtral")])
def test_frequencies_are_those_of_transformers(kind: str, content: dict[str, Any]) -> None:
    """Wherever the keys stand; the architectures differ in the base that is meant if none is given."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, scaling = read_rope(keys(**content), {"olmoe": 1e4, "mixtral": 1e6}[kind])
    f, growth = frequencies(HEAD_DIM, theta, scaling)
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    peer = AutoConfig.for_model(kind, **sizes, head_dim=HEAD_DIM, **copy.deepcopy(content))  # it writes into them
    rope = peer.rope_parameters
    want, want_growth = rope["rope_theta"] ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM), 1.0
    if rope["rope_type"] != "default":
        want, want_growth = ROPE_INIT_FUNCTIONS[rope["rope_type"]](peer, torch.device("cpu"))
    torch.testing.assert_close(f, want)
    assert growth == pytest.approx(want_growth)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param({"rope_parameters": YARN, "rope_scaling": {"type": "default"}}, "rope_type=yarn", id="yarn_lost"),
        pytest.param({"rope_parameters": LINEAR, "rope_scaling": YARN}, "rope_type=linear", id="two_kinds"),
        pytest.param(
            {"rope_parameters": {**YARN, "factor": 2.0}, "rope_scaling": YARN},
            "rope_parameters.factor=2.0",
            id="factors",
        ),
        pytest.param(
            {"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": YARN},
            "rope_theta=500000",
            id="theta_lost",
        ),
        pytest.param({"rope_scaling": {**YARN, "rope_type": "default", "type": "yarn"}}, "type=yarn", id="two_types"),
        pytest.param({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor", id="factor_of_no_type"),
        pytest.param({"rope_parameters": {**DEFAULT, "mscale": 1.0}}, "rope_parameters.mscale", id="mscale_of_default"),
        pytest.param({"rope_scaling": {**LINEAR, "attention_factor": 2.0}}, "attention_factor", id="growth_of_linear"),
        pytest.param({"rope_scaling": {**YARN, "attn_factor": 2.0}}, "attn_factor", id="growth_by_another_name"),
        pytest.param({"rope_scaling": {**YARN, "short_factor": [1.0]}}, "short_factor", id="longrope_in_yarn"),
        pytest.param({"rope_scaling": {"full_attention": YARN}}, "by layer type", id="by_layer_type"),
        pytest.param(
            {"rope_parameters": {**YARN, "full_attention": {}}}, "by layer type", id="by_layer_type_and_whole"
        ),
        pytest.param({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5", id="partial"),
        pytest.param({"partial_rotary_factor": True}, "partial_rotary_factor=True", id="partial_true"),
        pytest.param({"rope_scaling": YARN, "partial_rotary_factor": 0.25}, "0.25", id="partial_beside"),
        pytest.param({"rope_theta": 10**12}, "rope_theta=1000000000000", id="theta_of_10**12"),
        pytest.param({"rope_theta": 10**400}, "rope_theta=1000", id="theta_of_10**400"),
        pytest.param({"rope_theta": True}, "rope_theta=True", id="theta_true"),
        pytest.param({"rope_theta": 0}, "rope_theta=0", id="theta_0"),
        pytest.param({"rope_theta": -1e4}, "rope_theta=-10000.0", id="theta_negative"),
        pytest.param({"rope_theta": 1}, "rope_theta=1", id="theta_1"),
        pytest.param({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta=1e4", id="theta_of_text"),
        pytest.param({"rope_scaling": [YARN]}, "rope_scaling=[", id="list"),
        pytest.param({"rope_parameters": True}, "rope_parameters=True", id="true"),
        pytest.param({"rope_scaling": {**YARN, "factor": 10**400}}, "factor=1000", id="factor_of_10**400"),
        pytest.param({"rope_scaling": {**YARN, "factor": True}}, "factor=True", id="factor_true"),
        pytest.param({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate=no", id="truncate_of_text"),
        pytest.param({"rope_scaling": {**YARN, "beta_slow": [1]}}, "beta_slow=[1]", id="beta_of_a_list"),
        pytest.param(
            {"rope_scaling": YARN, "original_max_position_embeddings": -1}, "=-1", id="length_beside_negative"
        ),
        pytest.param({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "more than low_freq", id="no_ramp"),
        pytest.param({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor=None", id="null"),
        pytest.param({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor=0 must be", id="no_growth"),
        pytest.param({"rope_scaling": {**LINEAR, "factor": 1e-30}}, "factor=1e-30 must be", id="tiny"),
        pytest.param(
            {"rope_scaling": YARN, "original_max_position_embeddings": 8192.5}, "=8192.5 must be", id="half_a_token"
        ),
        pytest.param({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=['yarn']", id="type_of_a_list"),
    ],
)
def test_what_would_be_dropped_or_is_no_number_is_refused(content: dict[str, Any], said: str) -> None:
    """By its key."""
    message = complaint(lambda: read_rope(keys(**content), 1e4))
    assert "config.json" in message and said in message and len(message) < 250


def test_a_key_that_nobody_knows_is_left_to_be_named() -> None:
    """As every other key that is not read; how long the training's texts were may stand beside any kind."""
    config = keys(rope_scaling={**LINEAR, "finetuned": True, "original_max_position_embeddings": 32})
    read_rope(config, 1e4)
    assert config.unread() == ["rope_scaling.finetuned"]
