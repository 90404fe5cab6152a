"""models/checkpoint_latent.py, models/checkpoint_router.py: what the config.json of a DeepSeek model says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.models.checkpoint_forms import Fp8Blocks
from moe_lab.models.parameters import adopt, shareable
from moe_lab.models.rope import softmax_scale
from moe_lab.runs.run import run
from tests import tiny
from tests.models.checkpoints import build, checkpoint, complaint, edit_config, ids, load, tensors, write_tensors
from tests.models.released import LATENT, settings_of
from tests.routers.cases import make

kinds = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in LATENT])
V2, V3 = "deepseek_v2_lite", "deepseek_v3"
settings = partial(settings_of, LATENT)


@kinds
def test_released_models_are_read_off_their_configuration(kind: str, tmp_path: Path) -> None:
    """Every key of theirs is known."""
    found, content = settings(tmp_path, kind), LATENT[kind]
    decoder = found.decoder
    assert found.unread == ()
    assert decoder["latent"] == {
        "nope_dim": 128,
        "rope_dim": 64,
        "v_dim": 128,
        "kv_rank": 512,
        "q_rank": content["q_lora_rank"],
        "bias": False,
    }
    assert decoder["head_dim"] == 64 and decoder["n_kv_heads"] == content["num_attention_heads"]
    assert decoder["mlp_hidden_dim"] == content["moe_intermediate_size"]
    assert decoder["dense_hidden_dim"] == content["intermediate_size"]
    shared = content["n_shared_experts"] * content["moe_intermediate_size"]
    assert (decoder["shared_expert_hidden_dim"], decoder["shared_expert_gate"]) == (shared, False)
    assert (found.n_experts, found.top_k) == (content["n_routed_experts"], content["num_experts_per_tok"])
    assert found.dense_layers == frozenset(range(content["first_k_dense_replace"]))
    assert found.interleaved and found.extra_layers == (1 if kind == V3 else 0)
    assert found.form == (Fp8Blocks(128, 128) if kind == V3 else None)
    assert found.max_positions == content["max_position_embeddings"]
    assert found.router == {
        "_target_": "moe_lab.routers.scored_topk.ScoredTopK",
        "score": content["scoring_func"],
        "bias": kind != V2,
        "n_groups": content["n_group"],
        "top_groups": content["topk_group"],
        "group_score": "max" if kind == V2 else "top2",
        "renormalize": kind != V2,
        "scale": content["routed_scaling_factor"],
        "scales_input": False,
        "hash_layers": 0,
    }


@kinds
def test_the_scale_of_the_softmax_grows_with_the_square(kind: str, tmp_path: Path) -> None:
    """(0.1 mscale_all_dim ln(factor) + 1)^2, which nothing but that key asks for."""
    rope = LATENT[kind]["rope_scaling"]
    scale = softmax_scale(settings(tmp_path, kind).decoder["rope_scaling"])
    assert scale == pytest.approx({V2: 1.5896, V3: 1.8739, "moonlight": 1.0, "kimi_k2": 1.8133}[kind], abs=1e-4)
    for all_dim in (..., 0) if rope else ():
        content = {key: value for key, value in {**rope, "mscale_all_dim": all_dim}.items() if value is not ...}
        assert softmax_scale(settings(tmp_path, kind, rope_scaling=content).decoder["rope_scaling"]) == 1


def test_groups_of_a_greedy_router_have_no_effect(tmp_path: Path) -> None:
    """Neither has their absence."""
    for keys in ({"n_group": 8, "topk_group": 3}, {"n_group": None, "topk_group": ...}, {"topk_method": ...}):
        router = settings(tmp_path, V2, **keys).router
        assert (router["n_groups"], router["top_groups"]) == (1, 1)
    limited = settings(tmp_path, V2, topk_method="group_limited_greedy", n_group=8, topk_group=3).router
    assert (limited["n_groups"], limited["top_groups"], limited["group_score"]) == (8, 3, "max")


def test_keys_that_transformers_5_adds_are_known(tmp_path: Path) -> None:
    """They follow from others."""
    keys = {"head_dim": 64, "qk_head_dim": 192, "rope_interleave": True, "num_local_experts": 256}
    found = settings(tmp_path, V3, **keys)
    assert found.unread == () and found == settings(tmp_path, V3)
    assert not settings(tmp_path, V3, rope_interleave=False).interleaved


def test_a_layer_of_further_tokens_has_two_names(tmp_path: Path) -> None:
    """Of the hub and of transformers 5."""
    for keys, n in (
        ({"num_nextn_predict_layers": ...}, 0),
        ({"num_nextn_predict_layers": ..., "num_mtp_layers": 2}, 2),
    ):
        assert settings(tmp_path, V3, **keys).extra_layers == n


NEEDED = "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size n_shared_experts"
NEEDED += " intermediate_size first_k_dense_replace routed_scaling_factor n_group topk_group norm_topk_prob"
NEEDED += " n_routed_experts num_experts_per_tok"


@pytest.mark.parametrize("key", [pytest.param(key, id=key) for key in NEEDED.split()])
@pytest.mark.parametrize("value", [pytest.param(..., id="missing"), pytest.param(None, id="null")])
def test_what_it_cannot_do_without_is_named(key: str, value: Any, tmp_path: Path) -> None:
    """Whatever the defaults of transformers, which are one model's."""
    assert key in complaint(lambda: settings(tmp_path, V3, **{key: value}))


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        pytest.param(V3, {"q_lora_rank": ...}, "q_lora_rank", id="no_q_lora_rank"),
        pytest.param(V3, {"q_lora_rank": 0}, "q_lora_rank=0", id="q_lora_rank_of_0"),
        pytest.param(V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 must be even", id="odd_rope"),
        pytest.param(V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 must be 128", id="key_heads"),
        pytest.param(V3, {"head_dim": 128}, "head_dim=128 must be 64", id="head_dim"),
        pytest.param(V3, {"qk_head_dim": 128}, "qk_head_dim=128 must be 192", id="qk_head_dim"),
        pytest.param(V3, {"scoring_func": "softmax"}, "scoring_func=softmax", id="softmax"),
        pytest.param(V3, {"topk_method": "greedy"}, "topk_method=greedy", id="greedy"),
        pytest.param(V3, {"norm_topk_prob": "yes"}, "norm_topk_prob=yes", id="norm_as_text"),
        pytest.param(V3, {"n_group": 7}, "n_group=7", id="groups_of_a_part"),
        pytest.param(V3, {"topk_group": 9}, "topk_group=9", id="more_groups_than_there_are"),
        pytest.param(V3, {"n_group": 64, "topk_group": 1}, "topk_group=1", id="groups_too_small"),
        pytest.param(V3, {"routed_scaling_factor": 0}, "routed_scaling_factor=0", id="scale_of_0"),
        pytest.param(V3, {"moe_layer_freq": 2}, "moe_layer_freq=2", id="every_other_layer"),
        pytest.param(V3, {"moe_layer_freq": True}, "moe_layer_freq=True", id="freq_as_flag"),
        pytest.param(V3, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1", id="dense_below_0"),
        pytest.param(V3, {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers", id="too_many_extra_layers"),
        pytest.param(V3, {"hidden_act": "gelu"}, "hidden_act=gelu", id="activation"),
        pytest.param(V2, {"norm_topk_prob": True}, "norm_topk_prob=True", id="v2_norm"),
        pytest.param(V2, {"topk_method": "noaux_tc"}, "topk_method=noaux_tc", id="v2_method"),
        pytest.param(V2, {"scoring_func": "sigmoid"}, "scoring_func=sigmoid", id="v2_sigmoid"),
        pytest.param(V2, {"mlp_bias": True}, "mlp_bias=True", id="v2_mlp_bias"),
        pytest.param(V2, {"rope_interleave": False}, "rope_interleave=False", id="v2_halves"),
        pytest.param(V2, {"topk_method": "group_limited_greedy", "n_group": None}, "n_group", id="v2_no_groups"),
    ],
)
def test_what_would_be_another_model_is_refused(kind: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By the key and its value."""
    assert said in complaint(lambda: settings(tmp_path, kind, **keys))


def test_a_key_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """As of every architecture; those of an indexer would change what is attended to."""
    assert settings(tmp_path, V3, index_topk=2048).unread == ("index_topk",)


# --- what is loaded -------------------------------------------------------------------------------------------------

BIAS = "mlp.gate.e_score_correction_bias"


def biases(folder: Path) -> list[Any]:
    """Those of the files, in the order of the layers."""
    return [value for key, value in sorted(tensors(folder).items()) if key.endswith(BIAS)]


def test_a_router_has_the_bias_that_was_trained(tmp_path: Path) -> None:
    """So has the same one under its own name, or inside another; a router without one leaves it in the file."""
    folder = checkpoint("deepseek_v3", tmp_path)
    model = load(folder)
    same = load(folder, make_router=partial(make, "deepseek_v3", n_groups=3, top_groups=2, scale=1.5))
    for each in (model, same):
        loaded = [layer.mlp.router.bias_E for layer in each.layers[1:]]
        assert all(map(torch.equal, loaded, biases(folder))) and len(loaded) == 2
        assert each.untrained() == []
    assert torch.equal(same(ids(2, 9)).y, model(ids(2, 9)).y)
    assert load(folder, make_router=partial(make, "mixtral")).untrained() == []


def test_a_bias_of_another_score_is_zero_and_said(tmp_path: Path) -> None:
    """What was trained beside a sigmoid means nothing beside a softmax."""
    model = load(checkpoint("deepseek_v3", tmp_path), make_router=partial(make, "ernie4_5"))
    assert model.untrained() == ["bias_E"]
    assert not any(layer.mlp.router.bias_E.any() for layer in model.layers[1:])


def test_beside_shared_weights_only_the_bias_is_read(tmp_path: Path) -> None:
    """As where the cells of a sweep share a checkpoint; it is looked for as in a whole load."""
    folder = checkpoint("deepseek_v3", tmp_path)
    donor, model = load(folder), build(folder, empty=True)
    only = {key: value for key, value in tensors(folder).items() if key.endswith(BIAS)}
    write_tensors(folder, only)
    adopt(model, shareable(donor), torch.device("cpu"), 0)
    assert torch.equal(model(ids(2, 9)).y, donor(ids(2, 9)).y)
    write_tensors(folder, dict(list(only.items())[:1]))
    assert "1 missing: model.layers.2." + BIAS in complaint(
        lambda: adopt(build(folder, empty=True), shareable(donor), torch.device("cpu"), 0)
    )


def test_layers_of_further_tokens_stay_in_the_files(tmp_path: Path) -> None:
    """As many as config.json tells of; of another one it is said that nobody expects it."""
    folder = checkpoint("deepseek_v3", tmp_path)
    want, content = load(folder)(ids(1, 5)).y, tensors(folder)
    last = {key: value for key, value in content.items() if key.startswith("model.layers.2.")}
    further = {key.replace("layers.2.", "layers.3."): 2 * value for key, value in last.items()}
    write_tensors(folder, {**content, **further, "model.layers.3.eh_proj.weight": torch.ones(32, 64)})
    edit_config(folder, num_nextn_predict_layers=1)
    assert torch.equal(load(folder)(ids(1, 5)).y, want)
    edit_config(folder, num_nextn_predict_layers=0)
    assert "unexpected: model.layers.3." in complaint(lambda: load(folder))


@pytest.mark.thinned(1)
@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("prefill", "decode")])
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("deepseek_v2", "deepseek_v3")])
def test_a_run_is_verified_and_says_what_a_token_keeps(kind: str, phase: str, tmp_path: Path) -> None:
    """rank + rope values in each of three layers; each step against the reference, which makes keys and values."""
    folder = checkpoint(kind, tmp_path / "c")
    keys = [f"model.path={folder}", "router=native", "workload=random", f"workload.phase={phase}", "dtype=bf16"]
    keys += ["workload.context_len=9"] if phase == "decode" else []
    record = run(tiny.compose("checkpoint", *keys, "seq_len=3"), tmp_path / "run")
    assert record.status == "ok" and record.check is not None and record.memory is not None
    assert record.memory["cache_bytes_per_token"] == 3 * (14 + 8) * 2
    assert 0 < (record.check.cache_rel_error or 0) < 0.06
    assert record.implementation["attention"] == ("torch" if phase == "decode" else "torch:math")
