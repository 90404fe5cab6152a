"""experts/peers: the kernels of other projects, where they are installed; what is around them everywhere.

vLLM and DeepGEMM are played by small packages, which check what the real ones rely on, and compute as the formula says.
On a GPU the tests marked so run the real ones.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.experts.peers import tuning
from moe_lab.experts.peers.deepgemm import LAYOUTS, DeepGemm
from moe_lab.experts.peers.flashinfer import FlashInfer
from moe_lab.experts.peers.flashinfer_low import FlashInferLow
from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.peers.sonic import Sonic
from moe_lab.experts.peers.transformers import Transformers
from moe_lab.experts.peers.vllm import Vllm
from moe_lab.ops import extension
from moe_lab.routers.base import Routing
from tests.experts.cases import CPU, SCALES, UNUSED, assert_near, formula, make_routing, make_weights, make_x
from tests.ops.compiling import assert_compiles

PEERS: dict[str, Callable[[], Peer]] = {
    "vllm": Vllm,
    "deepgemm": lambda: DeepGemm(layout="ends"),
    "deepgemm_rows": lambda: DeepGemm(layout="rows"),
    "sonic": lambda: Sonic(tune=False),
    "flashinfer": lambda: FlashInfer(tune=False),
    "flashinfer_tuned": lambda: FlashInfer(tune=True),
    "flashinfer_low": lambda: FlashInferLow(tune=False),
    "flashinfer_low_tuned": lambda: FlashInferLow(tune=True),
    "grouped_mm": lambda: Transformers(impl="grouped_mm"),
    "batched_mm": lambda: Transformers(impl="batched_mm"),
    "hub_deepgemm": lambda: Transformers(impl="deepgemm"),
    "hub_sonicmoe": lambda: Transformers(impl="sonicmoe"),
}
ON_A_GPU = [name for name in PEERS if name not in ("grouped_mm", "batched_mm")]
TORCHS = pytest.mark.parametrize("impl", [pytest.param(name, id=name) for name in ("grouped_mm", "batched_mm")])


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ON_A_GPU])
def test_a_cpu_is_refused(name: str) -> None:
    """With the device that is needed; the package is not asked for first."""
    of_impl = f"experts.impl={name.removeprefix('hub_')}: " if name.startswith("hub_") else ""
    with pytest.raises(UnavailableError, match=rf"^{of_impl}needs device=cuda \(this run is on cpu\)$"):
        PEERS[name]().compute_on(CPU, load=False)


def test_what_one_implementation_of_transformers_does_not_compute_is_said_of_it_alone() -> None:
    with pytest.raises(UnavailableError, match=r"^experts\.impl=deepgemm: transformers computes bfloat16 only, not fl"):
        Transformers(impl="deepgemm").require(torch.float32, 64, 64)


class Absent(Peer):
    distribution = "no-such-kernels"
    modules = ("no_such_kernels", "json")
    function = "no_such_function"


class TooOld(Absent):
    pip = "kernels>=2"
    modules = ("json",)


def test_a_package_that_is_not_installed_is_named_for_pip() -> None:
    """With the reason of the first of its modules. One of another version lacks the function."""
    lacks = r"^cannot import json \(module 'json' has no attribute 'no_such_function'\); pip install kernels>=2$"
    with pytest.raises(UnavailableError, match=lacks):
        TooOld().kernels()
    message = r"^cannot import no_such_kernels \(No module named 'no_such_kernels'\); pip install no-such-kernels$"
    with pytest.raises(UnavailableError, match=message):
        Absent().kernels()


def test_the_reason_is_one_line(install: Callable[[str, str], None]) -> None:
    """Whatever a package raises when it is imported."""
    install("no_such_kernels", "raise RuntimeError('needs\\n  a driver')")
    with pytest.raises(UnavailableError, match=r"^cannot import no_such_kernels \(needs a driver\); pip install"):
        Absent().kernels()


@pytest.mark.parametrize(
    ("dtype", "D", "F", "message"),
    [
        pytest.param(torch.float32, 64, 64, "deep-gemm computes bfloat16 only, not float32", id="dtype"),
        pytest.param(torch.bfloat16, 64, 72, "deep-gemm needs widths that are multiples of 64, not 64, 72", id="F"),
        pytest.param(torch.bfloat16, 48, 64, "deep-gemm needs widths that are multiples of 64, not 48, 64", id="D"),
    ],
)
def test_what_it_does_not_compute_is_refused(dtype: torch.dtype, D: int, F: int, message: str) -> None:
    """When asked what computes it, and when called."""
    weights, x_TD = make_weights(3, D, F, dtype), make_x(5, D, dtype)
    with pytest.raises(UnavailableError, match=f"^{message}$"):
        DeepGemm(layout="ends").implementation(x_TD, weights)
    for scale in ("output", "input"):
        with pytest.raises(UnavailableError, match=f"^{message}$"):
            DeepGemm(layout="ends")(x_TD, make_routing(5, 3, 2), weights, scale=scale)


def test_a_wrong_key_is_a_mistake() -> None:
    """All values are named."""
    with pytest.raises(ValueError, match=r"^experts\.layout=psum: must be one of ends, rows\.$"):
        DeepGemm(layout="psum")
    with pytest.raises(ValueError, match=r"^experts\.impl=eager: must be one of grouped_mm, batched_mm, deepgemm, son"):
        Transformers(impl="eager")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Make a package importable for the test: install("a.b", source)."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(module: str, source: str) -> None:
        folder = tmp_path.joinpath(*module.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or str(tmp_path)).startswith(str(tmp_path)):
            del sys.modules[name]


VLLM = """
import torch
from torch.nn.functional import silu

def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
    assert topk_ids.dtype == torch.int32 and topk_weights.dtype == torch.float32
    assert hidden_states.is_contiguous() and topk_ids.is_contiguous()
    assert bool((topk_ids >= 0).all()) and bool((topk_ids < len(w1)).all())
    x, ids = hidden_states.double(), topk_ids.long()
    gate, up = torch.einsum("td,tkgd->tkg", x, w1.double()[ids]).chunk(2, -1)
    o = torch.einsum("tkf,tkdf->tkd", silu(gate) * up, w2.double()[ids])
    return (o * topk_weights.double().unsqueeze(-1)).sum(1).to(hidden_states.dtype)
"""


@UNUSED
@SCALES
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37)])
def test_unused_slots_never_reach_a_peer_that_does_not_know_them(
    install: Callable[[str, str], None], T: int, unused: float, scale: Any
) -> None:
    """Their weights are not read, a token without experts is zero whatever it holds, and the rest is the formula."""
    install("vllm.model_executor.layers.fused_moe.fused_moe", VLLM)
    weights, routing, x_TD = make_weights(5, 16, 32), make_routing(T, 5, 3, unused), make_x(T, 16)
    expected_TD = formula(x_TD, routing, weights, scale)
    no_slot_T = (routing.expert_ids_TK < 0).all(-1)
    x_TD[no_slot_T] = math.nan
    odd_TK = routing.weights_TK.masked_fill(routing.expert_ids_TK < 0, math.nan)
    y_TD = Vllm()(x_TD, routing._replace(weights_TK=odd_TK), weights, scale=scale)
    assert_near(y_TD, expected_TD)
    assert not y_TD[no_slot_T].any()


def test_ids_known_to_be_used_are_passed_on_as_they_are(install: Callable[[str, str], None]) -> None:
    """So that no kernel of ours is timed beside the peer's."""
    install("vllm.model_executor.layers.fused_moe.fused_moe", "def fused_experts(x, w1, w2, *slots): return slots")
    routing, weights = make_routing(4, 5, 2), make_weights(5, 16, 16)
    slots = Vllm().for_layer(weights, 2, static_k=True)(make_x(4, 16), routing, weights)
    assert slots[0] is routing.weights_TK and slots[1] is routing.expert_ids_TK
    slots = Vllm()(make_x(4, 16), routing, weights)
    assert slots[0] is not routing.weights_TK


DEEP_GEMM = """
import torch

__version__ = "9.9"

def m_grouped_bf16_gemm_nt_contiguous(a, b, d, grouped_layout, use_psum_layout):
    assert a.dtype == b.dtype == d.dtype == torch.bfloat16 and grouped_layout.dtype == torch.int32
    assert len(a) == len(d) and len(a) % 128 == 0
    if use_psum_layout:
        assert len(grouped_layout) == len(b)
        begin = 0
        for expert, end in enumerate(grouped_layout.tolist()):
            assert begin <= end <= len(a)
            d[begin:end] = (a[begin:end].float() @ b[expert].float().T).to(d.dtype)
            begin = -(-end // 128) * 128
        return
    assert len(a) == len(grouped_layout)
    for start in range(0, len(a), 128):
        experts = set(grouped_layout[start : start + 128].tolist()) - {-1}
        assert len(experts) == (int(grouped_layout[start]) >= 0)  # rows that are used come first
        for expert in experts:
            d[start : start + 128] = (a[start : start + 128].float() @ b[expert].float().T).to(d.dtype)
"""


@pytest.mark.thinned(1, empty=("T=0", "none used"))
@pytest.mark.parametrize(
    ("T", "E", "K", "unused"),
    [
        pytest.param(0, 5, 2, 0.0, id="T=0"),
        pytest.param(1, 7, 2, 0.0, id="T=1"),
        pytest.param(37, 12, 3, 0.4, id="some unused"),
        pytest.param(9, 5, 2, 1.1, id="none used"),
        pytest.param(150, 2, 1, 0.1, id="more than 128 rows"),
    ],
)
@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout) for layout in LAYOUTS])
def test_what_is_around_deepgemm(
    install: Callable[[str, str], None],
    layout: str,
    T: int,
    E: int,
    K: int,
    unused: float,
    device: torch.device,
) -> None:
    """Its rows are padded, of one expert in each 128, and the sum is the formula's. On a GPU the extension sorts."""
    if device.type == "cuda":
        extension.load()
    install("deep_gemm", DEEP_GEMM)
    dtype = torch.bfloat16
    weights, routing, x_TD = (
        make_weights(E, 64, 128, dtype, device),
        make_routing(T, E, K, unused, device),
        make_x(T, 64, dtype, device),
    )
    odd_TK = routing.weights_TK.masked_fill(routing.expert_ids_TK < 0, math.nan)
    y_TD = DeepGemm(layout=layout)(x_TD, routing._replace(weights_TK=odd_TK), weights)
    assert_near(y_TD, formula(x_TD, routing, weights))


def test_a_peer_that_torch_sorts_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sort counts with its time. Where the extension is loaded the record names that."""
    monkeypatch.setattr(extension, "_most_sorted", 0)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    warning = "torch sorts the slots for deep-gemm, which takes about ten launches; run moe-lab build first."
    assert DeepGemm(layout="ends").warning(on_gpu) == warning
    assert DeepGemm(layout="ends").warning(make_x(1, 64)) is None and Vllm().warning(on_gpu) is None
    monkeypatch.setattr(extension, "_most_sorted", 1024)
    assert DeepGemm(layout="ends").warning(on_gpu) is None


def test_deepgemm_says_which_copy_it_is(install: Callable[[str, str], None]) -> None:
    """Its own version."""
    install("deep_gemm", DEEP_GEMM)
    said = DeepGemm(layout="ends").implementation(
        make_x(1, 64, torch.bfloat16), make_weights(2, 64, 64, torch.bfloat16)
    )
    assert said == {"experts": "deep-gemm 9.9"}


@TORCHS
@UNUSED
@SCALES
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37)])
def test_transformers_computes_the_formula(impl: str, T: int, unused: float, scale: Any) -> None:
    """Its own functions, on a CPU."""
    pytest.importorskip("transformers")
    weights, routing, x_TD = make_weights(5, 16, 24), make_routing(T, 5, 2, unused), make_x(T, 16)
    assert_near(Transformers(impl=impl)(x_TD, routing, weights, scale=scale), formula(x_TD, routing, weights, scale))


@TORCHS
def test_transformers_says_its_version_and_implementation(impl: str) -> None:
    """As `transformers 5.17.0 grouped_mm`."""
    transformers = pytest.importorskip("transformers")
    experts = Transformers(impl=impl)
    experts.compute_on(CPU)
    said = experts.implementation(make_x(1, 16), make_weights(2, 16, 24))
    assert said == {"experts": f"transformers {transformers.__version__} {impl}"}


@SCALES
@pytest.mark.parametrize("unused", [pytest.param(0.0, id="all used"), pytest.param(0.4, id="some unused")])
def test_a_compiled_pass_holds_a_peer_as_one_node(unused: float, scale: Any) -> None:
    """Nothing of its Python is traced, and nothing breaks the graph."""
    pytest.importorskip("transformers")
    weights, routing, x_TD = make_weights(5, 16, 24), make_routing(9, 5, 2, unused), make_x(9, 16)
    experts, targets = Transformers(impl="grouped_mm"), []
    experts.compute_on(CPU)

    def backend(graph: Any, example_inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: experts(x, routing, weights, scale=scale), fullgraph=True, backend=backend)
    with torch.inference_mode():
        assert torch.equal(compiled(x_TD), experts(x_TD, routing, weights, scale=scale))
    assert sum("peer_experts" in target for target in targets) == 1
    assert not any("grouped_mm" in target for target in targets)


def skewed(T: int, E: int, K: int, device: torch.device) -> Routing:
    """One expert takes every token; the other slots go to as few others as there are."""
    ids_TK = torch.arange(K, dtype=torch.int32, device=device).add(E - K).expand(T, K).contiguous()
    return Routing(ids_TK, torch.rand(T, K, device=device).softmax(-1))


@pytest.mark.gpu
@SCALES
@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in ("even", "unused", "skewed")])
@pytest.mark.parametrize(
    ("T", "E", "K", "D", "F"),
    [
        pytest.param(0, 8, 2, 256, 512, id="T=0"),
        pytest.param(1, 8, 2, 256, 512, id="T=1"),
        pytest.param(7, 64, 8, 2048, 1024, id="T=7"),
        pytest.param(131, 12, 3, 448, 320, id="T=131"),
        pytest.param(1999, 60, 4, 1024, 704, id="T=1999"),
    ],
)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in PEERS])
def test_a_peer_that_is_installed_computes_the_formula(
    name: str, T: int, E: int, K: int, D: int, F: int, load: str, scale: Any, device: torch.device
) -> None:
    """In bf16, on odd numbers of tokens, with unused slots and skewed loads."""
    if name == "batched_mm" and T > 1000:
        pytest.skip("copies the weights of every slot: 34 GB")
    experts = PEERS[name]()
    weights, x_TD = make_weights(E, D, F, torch.bfloat16, device), make_x(T, D, torch.bfloat16, device)
    try:
        experts.compute_on(device)
        experts.implementation(x_TD, weights)
    except UnavailableError as error:
        pytest.skip(str(error))
    routing = skewed(T, E, K, device) if load == "skewed" else make_routing(T, E, K, 0.3 * (load == "unused"), device)
    y_TD = experts(x_TD, routing, weights, scale=scale)
    assert y_TD.dtype == x_TD.dtype and y_TD.shape == x_TD.shape
    expected_TD = torch.cat(
        [
            formula(x_TD[rows], Routing(*(part[rows] for part in routing[:2])), weights, scale)
            for rows in torch.arange(T, device=device).split(16)
        ]
    )
    assert float((y_TD.double() - expected_TD).norm()) <= 2e-2 * float(expected_TD.norm())


@pytest.mark.parametrize("rows", [pytest.param(64, id="64 rows"), pytest.param(128, id="128 rows")])
@pytest.mark.parametrize(
    ("T", "E", "K", "unused"),
    [
        pytest.param(1, 7, 2, 0.0, id="T=1"),
        pytest.param(37, 12, 3, 0.4, id="some unused"),
        pytest.param(9, 5, 2, 1.1, id="none used"),
        pytest.param(300, 2, 1, 0.1, id="several tiles"),
        pytest.param(9, 1, 1, 0.1, id="E=1"),
    ],
)
def test_the_index_maps_of_flashinfer(T: int, E: int, K: int, unused: float, rows: int, device: torch.device) -> None:
    """Every used slot stands once, in the valid rows of a tile of its expert, and these come first.

    On a GPU the extension sorts.
    """
    if device.type == "cuda":
        extension.load()
    from moe_lab.experts.peers.flashinfer_triton import index_maps

    ids_TK = make_routing(T, E, K, unused, device).expert_ids_TK
    tile_expert, tile_limit, slot_M, n_tiles = (part.tolist() for part in index_maps(ids_TK, E, rows))
    assert len(slot_M) == rows * len(tile_expert) == rows * len(tile_limit)
    ids_N, found = ids_TK.flatten().tolist(), []
    for tile in range(n_tiles[0]):
        mine = slot_M[tile * rows : tile_limit[tile]]
        assert 0 < len(mine) <= rows and mine == sorted(mine) and all(ids_N[slot] == tile_expert[tile] for slot in mine)
        found += mine
    assert sorted(found) == [slot for slot, expert in enumerate(ids_N) if expert >= 0]
    assert tile_expert[: n_tiles[0]] == sorted(tile_expert[: n_tiles[0]])


def launches() -> None:
    """Every kernel around the peers' own, at the sizes of real layers and at odd ones."""
    from moe_lab.experts.peers import deepgemm_triton, flashinfer_triton

    for T, E, K, D, F in (
        (37, 64, 8, 2048, 1024),
        (1, 8, 2, 4096, 14336),
        (300, 256, 8, 7168, 2048),
        (5, 7, 1, 64, 64),
        (5, 1, 1, 64, 64),
    ):
        ids_TK, weights_TK = torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K)
        x_TD = torch.zeros(T, D, dtype=torch.bfloat16)
        for ends in (False, True):
            x_MD, _, row_N = deepgemm_triton.gather(x_TD, ids_TK, E, ends=ends)
        deepgemm_triton.combine(x_MD, row_N, weights_TK)
        deepgemm_triton.swiglu(x_TD.new_empty(len(x_MD), 2 * F), row_N)
        flashinfer_triton.index_maps(ids_TK, E, 64)
        flashinfer_triton.index_maps(ids_TK, E, 128)


@pytest.mark.slow
def test_the_kernels_around_them_compile_for_a_gpu(tmp_path: Path) -> None:
    """Which their interpreter does not ask."""
    assert_compiles(launches, tmp_path)


def test_the_fastest_is_what_took_the_least_time_and_was_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the calls counts; a candidate that the kernels refuse is left out."""
    took = {(1, 1): [9.0] * 7, (2, 2): [8.0, 1.0, 1.0, 8.0, 1.0, 1.0, 8.0], (4, 4): [0.5, *[2.0] * 6]}

    def call(*candidate: int) -> torch.Tensor:
        if candidate == (8, 8):
            raise ValueError("cannot implement")
        return torch.tensor(candidate)

    monkeypatch.setattr(tuning, "_milliseconds", lambda timed: took[tuple(timed().tolist())].pop())
    assert tuning.fastest(call, [(8, 8), *took], "tiles") == ((2, 2), 1.0)


FLASHINFER = """
from torch.nn.functional import silu

REFUSED = ()

def interleave_up_gate_sm90(w):
    return w.clone()

def refuse(shape):
    if shape[0] in REFUSED:
        raise ValueError(f"cannot implement\\n  tile_shape_mn={shape}")

def tiles(maps, rows, topk):
    expert, limit, slot, n = (part.tolist() for part in maps)
    for tile in range(n[0]):
        valid = range(tile * rows, limit[tile])
        yield expert[tile], list(valid), [slot[row] // topk for row in valid], [slot[row] for row in valid]

def sm90_contiguous_gather_grouped_gemm_act_fusion(x, w, *maps, topk, permuted_m, tile_shape_mn, swizzle_size):
    refuse(tile_shape_mn)
    h = x.new_empty(permuted_m, w.shape[1] // 2)
    for expert, rows, tokens, _ in tiles(maps, tile_shape_mn[0], topk):
        gate, up = (x[tokens].double() @ w[expert].double().T).chunk(2, -1)
        h[rows] = (silu(gate) * up).to(x.dtype)
    return h
"""

FINALIZE = """
from flashinfer.fused_moe.cute_dsl.sm90_contiguous_gather_grouped_gemm_act_fusion import tiles

def sm90_contiguous_grouped_gemm_finalize_fusion(
    h, w, *others, topk, tile_shape_mn, cluster_shape_mn, raster_along_m
):
    *maps, weights, y = others
    for expert, rows, tokens, slots in tiles(maps, tile_shape_mn[0], topk):
        o = h[rows].double() @ w[expert].double().T * weights.flatten()[slots].double().unsqueeze(1)
        y.index_add_(0, y.new_tensor(tokens).long(), o.to(y.dtype))
"""


def install_flashinfer(install: Callable[[str, str], None], refused: tuple[int, ...] = ()) -> None:
    folder = "flashinfer.fused_moe.cute_dsl"
    kernels = FLASHINFER.replace("REFUSED = ()", f"REFUSED = {refused}")
    install(f"{folder}.sm90_contiguous_gather_grouped_gemm_act_fusion", kernels)
    install(f"{folder}.sm90_contiguous_grouped_gemm_finalize_fusion", FINALIZE)


@UNUSED
@pytest.mark.parametrize(
    ("tune", "refused"),
    [pytest.param(False, (), id="default"), pytest.param(True, (64,), id="tuned, 64 rows are refused")],
)
def test_what_is_around_flashinfer(
    install: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    unused: float,
    tune: bool,
    refused: tuple[int, ...],
    device: torch.device,
) -> None:
    """The index maps and the sum make the formula, also where the kernels refuse some of the tiles."""
    install_flashinfer(install, refused)
    monkeypatch.setattr(tuning, "_milliseconds", lambda call: 1.0)
    weights, routing = make_weights(5, 64, 32, device=device), make_routing(150, 5, 2, unused, device)
    x_TD = make_x(150, 64, device=device)
    experts = FlashInfer(tune=tune)
    experts.dtypes = (torch.float32,)
    assert_near(experts(x_TD, routing, weights), formula(x_TD, routing, weights))


def test_kernels_that_refuse_every_tile_are_unavailable(install: Callable[[str, str], None]) -> None:
    """With the last reason, in one line, and what to set."""
    install_flashinfer(install, refused=(64, 128))
    weights, x_TD = make_weights(3, 64, 32, torch.bfloat16), make_x(5, 64, torch.bfloat16)
    message = (
        r"^flashinfer-python, tiles of 128 rows for gate and up: all 8 that experts\.tune=true tries are refused, "
        r"the last one because cannot implement tile_shape_mn=\(128, 64\); experts\.tune=false takes the default$"
    )
    with pytest.raises(UnavailableError, match=message):
        FlashInfer(tune=True)(x_TD, make_routing(5, 3, 2), weights)


def test_columns_that_are_all_refused_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> torch.Tensor:
        raise ValueError("no such columns")

    monkeypatch.setattr(FlashInferLow, "_launch", refuse)
    weights, x_TD = make_weights(3, 128, 128, torch.bfloat16), make_x(5, 128, torch.bfloat16)
    with pytest.raises(UnavailableError, match=r"columns of a warp: all 5 .* because no such columns; experts\.tune=f"):
        FlashInferLow(tune=True)(x_TD, make_routing(5, 3, 2), weights)


def test_more_experts_per_token_than_a_block_has_warps_are_unavailable() -> None:
    """A kernel of 33 warps does not start."""
    weights, x_TD = make_weights(33, 128, 128, torch.bfloat16), make_x(1, 128, torch.bfloat16)
    with pytest.raises(UnavailableError, match="few tokens: at most 32 experts per token, not 33"):
        FlashInferLow(tune=False)(x_TD, make_routing(1, 33, 33), weights)
