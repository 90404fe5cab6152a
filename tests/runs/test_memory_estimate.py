"""runs/memory_estimate.py: never more than a run takes, and not much less; what does not fit is refused in one line."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.measure import memory
from moe_lab.models.checkpoint import without_weights
from moe_lab.models.parameters import parameter_bytes
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.runs import build, memory_estimate
from moe_lab.runs.run import Run
from tests import tiny
from tests.models.released import LATENT, SHARED, settings_of
from tests.models.test_checkpoint_deepseek import MISTRAL_4
from tests.models.test_checkpoint_variants import RELEASED as VARIANTS

CPU = torch.device("cpu")
FACTOR, MORE = 4, 100e6
"""A run takes at most so many times its estimate, and what comparing takes whatever the sizes."""
SMALL = ["model.d_model=64", "model.n_heads=2", "model.n_layers=1", "model.mlp_hidden_dim=64", "model.vocab_size=256"]
DECODE = ["model=transformer_decoder", "workload.phase=decode"]

CASES = [
    pytest.param(["model=minimal", "model.hidden=5000"], id="minimal", marks=pytest.mark.slow),
    pytest.param(["model=minimal", "model.hidden=64", "batch=150000"], id="minimal_batch", marks=pytest.mark.slow),
    pytest.param(["model=moe_layer", "model.shape.n_experts=16", "batch=1", "seq_len=64"], id="layer"),
    pytest.param(
        ["model=moe_layer", "model.shape.d_model=256", "model.shape.mlp_hidden_dim=64", "batch=1", "seq_len=40000"],
        id="layer_tokens",
        marks=pytest.mark.slow,
    ),
    pytest.param(["model=router", "batch=64", "seq_len=1000"], id="router"),
    pytest.param(
        ["model=transformer_decoder", "model.n_layers=3", "batch=1", "seq_len=16"],
        id="dense_parameters",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["model=transformer_decoder", *SMALL, "model.vocab_size=40000", "batch=1", "seq_len=400"], id="logits"
    ),
    pytest.param(
        ["model=transformer_decoder", *SMALL, "model.mlp_hidden_dim=4000", "seq_len=2500"],
        id="dense_mlp",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["model=decoder_moe", "model.n_layers=1", "batch=1", "seq_len=16"], id="experts", marks=pytest.mark.slow
    ),
    pytest.param(
        ["model=decoder_moe", "dtype=bf16", "model.n_layers=1", "batch=1", "seq_len=16"],
        id="bf16",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["model=decoder_moe", *SMALL, "model.n_layers=200", "batch=1", "seq_len=1"],
        id="modules",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["model=decoder_moe", *SMALL, "model.n_layers=2", "workload.phase=prefill", "batch=32", "seq_len=1000"],
        id="prefill",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        [
            "model=transformer_decoder",
            *SMALL,
            "workload.phase=decode",
            "seq_len=8",
            "workload.context_len=3000",
            "batch=64",
        ],
        id="decode",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(memory.resident_peak_bytes() is None, reason="this system does not tell the resident peak")
@pytest.mark.parametrize("overrides", CASES)
def test_the_estimate_against_the_measured_peak(overrides: list[str], tmp_path: Path) -> None:
    """From before the run is built until it is verified."""
    by_key = {text.split("=")[0]: text for text in overrides}  # a case replaces what is in SMALL
    cfg = moe_lab.compose([*by_key.values(), "device=cpu"])
    parts = memory_estimate.estimate(cfg)
    assert parts is not None
    gc.collect()
    memory.give_back_free_memory()
    memory._CLEAR_REFS.write_text("5")
    before = memory._kilobytes(memory._STATUS, "VmRSS:")
    run = Run(cfg, tmp_path)
    run.build()
    run._verify_step()
    peak = memory.resident_peak_bytes()
    assert before is not None and peak is not None
    assert sum(parts.values()) <= 1.02 * (peak - before) + 2e6  # what lay free in the heap is taken again
    assert peak - before <= FACTOR * sum(parts.values()) + MORE


BILLION = 10**9
TOO_LARGE = [
    pytest.param("batch=2000000", "batch", id="batch"),
    pytest.param("seq_len=1000000000", "seq_len", id="seq_len"),
    pytest.param("model.n_layers=10000 model.d_model=4096", "model.n_layers", id="layers"),
    pytest.param("model.n_experts=1000000", "model.n_experts", id="experts"),
    pytest.param("model.vocab_size=1000000000", "model.vocab_size", id="vocabulary"),
    pytest.param("model.mlp_hidden_dim=1000000000", "model.mlp_hidden_dim", id="width_of_experts"),
    pytest.param("model.shared_expert_hidden_dim=1000000000", "model.d_model", id="shared_expert"),
    pytest.param("model.n_dense_layers=1 model.dense_hidden_dim=1000000000", "model.d_model", id="dense_layer"),
    pytest.param("model=transformer_decoder model.d_model=1000000", "model.d_model", id="dense"),
    pytest.param("model=minimal model.hidden=1000000", "model.hidden", id="minimal"),
    pytest.param("model=minimal batch=1000000000", "batch", id="minimal_batch"),
    pytest.param("model=moe_layer model.shape.n_experts=1000000", "model.shape.n_experts", id="layer_experts"),
    pytest.param("model=moe_layer batch=1000000 seq_len=1000", "batch", id="layer_tokens"),
    pytest.param("model=router batch=1000000 seq_len=1000", "batch", id="router_tokens"),
    pytest.param(
        "model=router model.gate=true model.shape.d_model=1000000000 batch=1 seq_len=1",
        "model.shape.d_model",
        id="gate",
    ),
    pytest.param("workload.phase=decode workload.context_len=100000000", "workload.context_len", id="context"),
    pytest.param("workload.phase=decode seq_len=100000000", "seq_len", id="steps"),
    pytest.param("workload.phase=prefill batch=10000000", "batch", id="prefill"),
    pytest.param("dtype=bf16 batch=2000000", "batch", id="bf16"),
    pytest.param(
        "model=moe_layer model.shape.n_experts=100000 model.shape.d_model=8 model.shape.mlp_hidden_dim=8 batch=10000",
        "batch",
        id="logits",
    ),
    pytest.param(
        "model=moe_layer router=loss_free router.calibration_tokens=1000000000",
        "router.calibration_tokens",
        id="calibration",
    ),
    pytest.param(
        "model=moe_layer router=capacity router@router.inner=loss_free router.inner.calibration_tokens=1000000000",
        "router.calibration_tokens",
        id="inner_calibration",
    ),
]


@pytest.mark.parametrize(("overrides", "key"), TOO_LARGE)
def test_what_cannot_fit_is_refused_at_once(overrides: str, key: str, tmp_path: Path) -> None:
    """In one line that names a key to lower; there is no run."""
    cfg = moe_lab.compose([*overrides.split(), "device=cpu"])
    with pytest.raises(UnavailableError, match=r"memory: needs at least [\d.,]+ GB") as refused:
        moe_lab.run(cfg, tmp_path / "run")
    assert key in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["minimal", "decoder_moe", "transformer_decoder", "moe_layer", "router"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_parameters_are_those_of_the_model(model: str, dtype: str) -> None:
    """But for norms and what a router has."""
    sizes = ["model.n_kv_heads=2", "model.head_dim=32", "model.tie_embeddings=true"] if "decoder" in model else []
    sizes += ["model.n_dense_layers=2", "model.shared_expert_hidden_dim=64"] if model == "decoder_moe" else []
    cfg = moe_lab.compose([f"model={model}", f"dtype={dtype}", *sizes, "device=cpu"])
    parts = memory_estimate.estimate(cfg)
    assert parts is not None
    real = parameter_bytes(build._make_model(cfg, torch.device("meta")))
    assert 0.999 * real <= parts["parameters"] <= real


OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
}


def test_of_a_checkpoint(tmp_path: Path) -> None:
    """Its sizes stand in its config.json; a folder without one is a mistake to be named by whoever reads it."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(OLMOE))
    cfg = moe_lab.compose(["model=checkpoint", f"model.path={tmp_path / 'c'}", "router=native", "device=cpu"])
    parts = memory_estimate.estimate(cfg)
    assert parts is not None
    real = parameter_bytes(build._make_model(cfg, torch.device("meta")))
    assert 0.99 * real <= parts["parameters"] <= real
    cfg.batch = BILLION
    assert "lower batch" in str(memory_estimate.refusal(cfg, CPU))
    cfg.model.path = str(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        memory_estimate.estimate(cfg)


GATED = {
    **OLMOE,
    "model_type": "qwen3_next",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 24,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_layers_with_states(dtype: str, tmp_path: Path) -> None:
    """Three gated delta nets and a layer of attention with a gate: parameters, and the cache as it is allocated."""
    (tmp_path / "config.json").write_text(json.dumps({**GATED, "norm_topk_prob": True}))
    keys = ["workload=random", "workload.phase=decode", "workload.context_len=9", "seq_len=3", "batch=5"]
    cfg = moe_lab.compose(
        ["model=checkpoint", f"model.path={tmp_path}", "router=native", "device=cpu", f"dtype={dtype}", *keys]
    )
    parts = memory_estimate.estimate(cfg)
    assert parts is not None
    model = build._make_model(cfg, torch.device("meta"))
    real = parameter_bytes(model)
    assert 0.98 * real <= parts["parameters"] <= real
    assert isinstance(model, TransformerDecoder)
    allocated = sum(buffer.numel() * buffer.element_size() for buffer in model.make_cache(5, 12).buffers())
    assert allocated - 3 * 8 == parts["cache"]  # less where the context ends


RELEASED = {**LATENT, **SHARED, **VARIANTS, "mistral4": MISTRAL_4}


_EACH_MIXER = {"deepseek_v3", "gpt_oss", "lfm2_moe"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind, marks=[pytest.mark.slow] * (kind not in _EACH_MIXER)) for kind in RELEASED]
)
def test_of_released_checkpoints(kind: str, tmp_path: Path) -> None:
    """The parameters but for norms and biases, and a cache of what each layer keeps."""
    settings_of(RELEASED, tmp_path, kind)
    words = ["model=checkpoint", f"model.path={tmp_path}", "router=native", "device=cpu", "dtype=bf16", "batch=2"]
    cfg = moe_lab.compose([*words, "workload.phase=decode", "workload.context_len=100", "seq_len=28"])
    parts, model = memory_estimate.estimate(cfg), without_weights(tmp_path)
    assert parts is not None
    assert 0.998 * parameter_bytes(model) / 2 <= parts["parameters"] <= parameter_bytes(model) / 2
    with torch.device("meta"):
        cache = model.to(torch.bfloat16).make_cache(2, 128)
    assert parts["cache"] == cache.bytes_per_position * 128 + 3 * cache.state_bytes


def test_a_text_is_in_memory_whole(tmp_path: Path) -> None:
    """Of bytes with the ids and where each ends."""
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(10**10)
    cfg = moe_lab.compose(
        ["model=decoder_moe", "model.vocab_size=256", "workload=text", f"workload.path={tmp_path}/a.txt", "device=cpu"]
    )
    parts = memory_estimate.estimate(cfg)
    assert parts is not None and parts["text"] == 16 * 10**10
    with pytest.raises(UnavailableError, match=r"memory: needs at least .*text.*lower the size of the texts"):
        moe_lab.run(cfg, tmp_path / "run")


def test_a_model_of_the_users_is_not_estimated() -> None:
    """Nobody knows its sizes."""
    cfg = moe_lab.compose(["model=minimal", "device=cpu"])
    cfg.model._target_ = "mine.models.minimal.Minimal"
    assert memory_estimate.estimate(cfg) is None and memory_estimate.refusal(cfg, CPU) is None


def test_a_tight_run_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From four fifths of what is there; swap space may take the rest of a run that is more."""
    cfg = tiny.minimal("model.hidden=500")
    parts = memory_estimate.estimate(cfg)
    assert parts is not None
    needed = sum(parts.values())
    for there, warned in ((needed * 2, False), (needed * 1.1, True), (needed * 0.9, True)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, there=there: int(there))
        monkeypatch.setattr(memory, "swap_bytes", lambda: needed)
        record = moe_lab.run(cfg, tmp_path / str(there))
        assert record.status == "ok"
        assert any(text.startswith("memory: needs at least") for text in record.warnings) is warned
    monkeypatch.setattr(memory, "swap_bytes", lambda: 0)
    with pytest.raises(UnavailableError, match="memory: needs at least"):
        moe_lab.run(cfg, tmp_path / "refused")


def test_on_a_gpu_modules_are_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place by what it has."""
    cfg = tiny.decoder_moe("model.n_layers=50")
    asked: dict[str, int] = {"cuda": 10**12, "cpu": 10**5}
    monkeypatch.setattr(memory, "available_bytes", lambda device: asked[device.type])
    monkeypatch.setattr(memory, "swap_bytes", lambda: 0)
    assert "modules" in str(memory_estimate.refusal(cfg, torch.device("cuda")))
    asked.update(cuda=1000, cpu=10**12)
    reason = memory_estimate.refusal(cfg, torch.device("cuda"))
    assert "this cuda has 0.001 MB" in str(reason) and "modules" not in str(reason)


def test_it_needs_no_torch() -> None:
    """Nor does the config.json of a checkpoint: `moe-lab plan` does not wait for it."""
    overrides = ["model=checkpoint", "router=native", f"model.path={tiny.ROOT}/assets/tiny-olmoe", "workload=random"]
    code = f"""
import sys
import moe_lab
from moe_lab.runs.memory_estimate import estimate
from moe_lab.sweep.plan import plain
assert estimate(plain(moe_lab.compose({overrides})))["parameters"] > 1e6
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
