"""From a checked configuration to its objects: device, router, experts, model, input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from moe_lab.config.schemas import Workload
from moe_lab.config.targets import instantiate, keys_of, locate, require_keys
from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts, FunctionExperts, require_plain
from moe_lab.models import checkpoint_config
from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.models.parameters import Donor, adopt, initialize, parameter_bytes, without_storage
from moe_lab.models.serving import Decode, Prefill
from moe_lab.models.soft_moe import SoftMoELayer
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.ops import extension
from moe_lab.ops.library import DTYPES, asked_of
from moe_lab.records.identity import digest, option_name
from moe_lab.records.weight_changes import active, other_keys
from moe_lab.routers.base import Router, Routing
from moe_lab.routers.contract import check_declarations
from moe_lab.routers.soft import SoftMoE
from moe_lab.runs import trained, weight_changes
from moe_lab.runs.memory_estimate import require_memory
from moe_lab.runs.passes import (
    n_positions,
    of_all_passes,
    prefill_backends,
    prefill_passes,
    step_backends,
    tokens_at_once,
)
from moe_lab.runs.trained import NATIVE, is_checkpoint, is_native
from moe_lab.runs.weight_changes import Nodes, WeightChanges
from moe_lab.workloads.forced import forces

_PLAIN_ROUTER = {
    "_target_": "moe_lab.routers.softmax_topk.SoftmaxTopK",
    "name": "torch",
    "impl": "torch",
    "top_k": None,
    "renormalize": True,
    "gate_bias": False,
}
_PLAIN_EXPERTS = {"_target_": "moe_lab.experts.loop.Loop", "name": "loop"}
"""What a calibration text goes through, whatever the run's own are."""


def resolve_device(cfg: DictConfig) -> torch.device:
    """The device that `cfg.device` means here.

    Raises:
        UnavailableError: it is not there, or does not compute `cfg.dtype` or `cfg.execution`.
    """
    has_cuda = torch.cuda.is_available()
    name = cfg.device.name
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise UnavailableError("device=cuda: no CUDA device found; use device=cpu or device=auto")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device.name={name}: must be auto, cpu or cuda.")
    if name == "cpu" and cfg.dtype.name == "fp16":
        raise UnavailableError("dtype=fp16: not supported on a CPU; use bf16 or fp32")
    if name == "cpu" and cfg.execution.name == "cuda_graph":
        raise UnavailableError("execution=cuda_graph: not supported on a CPU; use execution=eager or compile")
    cache = cfg.measure.cache
    if cache == "hot" and cfg.execution.name != "cuda_graph":
        raise UnavailableError(
            "measure.cache=hot needs a CUDA graph; use execution=cuda_graph or measure.cache=natural"
        )
    if cache == "cold" and name == "cpu":
        raise UnavailableError("measure.cache=cold: not supported on a CPU; use device=cuda")
    if name == "cuda" and cfg.dtype.name == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        raise UnavailableError("dtype=bf16: needs a GPU with compute capability >= 8.0; use fp16 or fp32")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def build_router(cfg: DictConfig, n_experts: int | None = None, top_k: int | None = None) -> Router:
    """A new router of `cfg.router`, for the model's sizes unless others are given; the one that a run of `cfg` has.

    It computes on the device of `cfg`, where its parameters lie, filled from `cfg.seed`. One that `calibrates` is to
    be fitted (`Router.fit`).

    Raises:
        UnavailableError: the implementation asked for cannot run here.
        ValueError: the model has no experts and no sizes were given; `cfg` is no configuration.
    """
    _require_composed(cfg)
    device = resolve_device(cfg)
    with _defaults(device, DTYPES[cfg.dtype.name]):
        router = undecided_router(cfg, n_experts, top_k)
    initialize(router, cfg.seed)
    router.eval().requires_grad_(False)
    decide(cfg, router, device)
    return router


def _require_composed(cfg: object) -> None:
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{cfg!r:.60}: must be a configuration; give moe_lab.compose([...]).")


def undecided_router(cfg: DictConfig, n_experts: int | None = None, top_k: int | None = None) -> Router:
    """As `build_router`, with empty parameters where torch puts them, and nobody to compute it (`decide`)."""
    if n_experts is None or top_k is None:
        sizes = cfg.model.get("shape") or cfg.model
        if is_checkpoint(cfg.model):
            settings = checkpoint_config.read(cfg.model.path)
            sizes = {"n_experts": settings.n_experts, "top_k": cfg.model.get("top_k") or settings.top_k}
        n_experts, top_k = n_experts or sizes.get("n_experts"), top_k or sizes.get("top_k")
    if n_experts is None or top_k is None:
        raise ValueError(f"model={cfg.model.name} has no experts; pass n_experts and top_k to build_router.")
    if not isinstance(top_k, int):
        raise ValueError(f"model.top_k={top_k}: differs between the layers; pass top_k to build_router.")
    return _make_router(cfg, cfg.router, n_experts, top_k)


def decide(cfg: DictConfig, model: nn.Module, device: torch.device, *, load: bool = True) -> None:
    """Every part of `model` that has a choice decides who computes it on `device` (`Router.compute_on`, `Experts`).

    Raises:
        UnavailableError: what was asked for cannot compute there.
    """
    experts = {id(layer.experts): layer.experts for layer in moe_layers(model)}
    for part in (*model.modules(), *experts.values()):
        compute_on: Any = getattr(part, "compute_on", None)
        try:
            if compute_on is not None:
                compute_on(device, load=load)
        except UnavailableError as error:
            group = "router" if isinstance(part, Router) else "experts" if isinstance(part, Experts) else None
            name = "" if group is None else f"{group}={option_name(cfg[group])}: "
            raise UnavailableError(f"{name}{error}") from error
    if load:  # for `dispatch` and `combine`, which no part owns
        extension.load_if_built(device)


def _make_router(cfg: DictConfig, node: DictConfig, n_experts: int, top_k: int, group: str = "router") -> Router:
    """The router of `node`, whose keys are called `group.KEY`."""
    top_k, inner = node.get("top_k") or top_k, {}
    if isinstance(node.get("inner"), DictConfig) and "_target_" in node.inner:
        inner["inner"] = _make_router(cfg, node.inner, n_experts, top_k, f"{group}.inner")
        if node.get("top_k") and inner["inner"].top_k != top_k:
            raise ValueError(
                f"{group}.top_k={top_k}: router={option_name(node.inner)} inside has {group}.inner.top_k="
                f"{inner['inner'].top_k}, which is used; set {group}.inner.top_k instead."
            )
    if is_native(node) and is_checkpoint(cfg.model):  # what it is stands in the checkpoint's own configuration
        require_keys(
            locate(NATIVE), [k for k in keys_of(node, group) if k != "top_k"], group, given=("n_experts", "top_k")
        )
        native = OmegaConf.create(checkpoint_config.read(cfg.model.path).router)
        node = OmegaConf.create({"name": node.name, "impl": node.impl, **native})
    if "renormalize" in node and node.renormalize is None:
        node = trained.with_its_weights(cfg, node, group)
    keys = [str(key) for key in node if key not in ("top_k", "calibration_tokens", *inner)]
    try:
        router = instantiate(OmegaConf.masked_copy(node, keys), group, n_experts=n_experts, top_k=top_k, **inner)
    except UnavailableError as error:
        raise UnavailableError(f"router={option_name(node)}: {error}") from error
    if not isinstance(router, Router):
        raise ValueError(f"{group}: {node._target_} is not a subclass of moe_lab.routers.base.Router.")
    if "calibration_tokens" in node and (inner or type(router).fit is Router.fit):
        where = f"set {group}.inner.calibration_tokens" if inner else "remove it"
        raise ValueError(f"{group}.calibration_tokens: router={option_name(node)} is not calibrated; {where}.")
    return router


def build_experts(cfg: DictConfig) -> Experts:
    """The experts of `cfg.experts`, for the device that is being built for; all layers of a model share them.

    Raises:
        UnavailableError: they cannot run here.
        ValueError: a key that they do not take, or a `_target_` that is neither such a class nor a function.
    """
    node = cfg.experts
    target = locate(node._target_)
    try:
        if inspect.isfunction(target):
            return FunctionExperts(target, **keys_of(node, "experts"))
        if isinstance(target, type) and issubclass(target, Experts):
            experts: Experts = instantiate(node, "experts")
            return experts
    except UnavailableError as error:
        raise UnavailableError(f"experts={option_name(node)}: {error}") from error
    raise ValueError(
        f"experts: {node._target_} must be a subclass of moe_lab.experts.base.Experts or a function with its signature."
    )


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    cfg: DictConfig, device: torch.device | None = None, donor: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The model of `cfg` in its dtype on its device, parameters filled from `cfg.seed`, in inference mode.

    With `donor`, parameters by name of a model with the same `weights_key`, it shares those tensors.

    Raises:
        UnavailableError: the run would need more memory than is there; a part cannot run on the device.
    """
    _require_composed(cfg)
    device = device or resolve_device(cfg)
    require_memory(cfg, device)
    if donor is None and (nodes := active(cfg.model)):
        donor = _changed(nodes, cfg, device)
    with without_storage() if donor is not None else nullcontext():
        model = _make_model(cfg, device)
    decide(cfg, model, device)
    changes: WeightChanges | None = getattr(donor, "changes", None)
    assert (changes is not None) == bool(active(cfg.model)), "a donor has the weights that the configuration asks for"
    if donor is None:
        initialize(model, cfg.seed)
    elif changes is None:
        adopt(model, donor, device, cfg.seed)
    else:
        adopt(model, {**donor, **changes.router_biases(model)}, device, cfg.seed)
        model.weight_changes = changes  # type: ignore[assignment]
    model.eval().requires_grad_(False)
    _calibrate(cfg, model, device)
    return model


def _changed(nodes: Nodes, cfg: DictConfig, device: torch.device) -> Donor:
    """The changed parameters. They are those of no router, implementation or input: see `weights_key`."""
    plain = trained.unchanged(cfg)
    plain.router = OmegaConf.create(trained.native_router("torch") if is_checkpoint(cfg.model) else _PLAIN_ROUTER)
    plain.experts = OmegaConf.create(_PLAIN_EXPERTS)
    _make_model(cfg, torch.device("meta"))  # its errors, before anything is loaded
    return weight_changes.changed(nodes, plain, build_model(plain, device), device)


@torch.inference_mode()
def _calibrate(cfg: DictConfig, model: nn.Module, device: torch.device) -> None:
    """Fit the routers that ask for it, layer by layer, in one pass over tokens of another seed than the run's."""
    layers = [layer for layer in moe_layers(model) if layer.router.calibrates]
    if not layers:
        return

    def fit(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, MoELayer)
        layer.router.fit(layer.logits(arguments[0]))

    with hooked(layers, fit, before=True):
        tokens_per_sequence = 1 if "seq_len" in cfg.model.get("ignores", ()) else cfg.seq_len
        fitted = cfg.router.inner if "inner" in cfg.router else cfg.router  # capacity passes `fit` on
        batch = -(-fitted.get("calibration_tokens", 4096) // tokens_per_sequence)
        model(build_input(cfg, model, device, batch=batch, seq_len=cfg.seq_len, seed=cfg.seed + 1))


def _make_model(cfg: DictConfig, device: torch.device) -> nn.Module:
    """The model with its tensors on `device`, which hold nothing yet; nobody has decided who computes it."""
    parts: dict[str, Any] = {}
    ignores, nodes = cfg.model.get("ignores", ()), active(cfg.model)

    def make_router(n_experts: int, top_k: int) -> Router:
        left = weight_changes.n_left(nodes, n_experts, cfg.router.get("top_k") or top_k)
        return _make_router(cfg, cfg.router, left, top_k)

    if "router" not in ignores:
        parts["make_router"] = make_router
    with _defaults(device, DTYPES[cfg.dtype.name]):
        if "experts" not in ignores:
            parts["experts"] = build_experts(cfg)
        keys = [key for key in other_keys(cfg.model) if key != "ignores"]
        model: nn.Module = instantiate(OmegaConf.masked_copy(cfg.model, keys), "model", **parts)
        weight_changes.prepare(nodes, model, parts.get("experts"))
    return model


def parameters_of(cfg: DictConfig) -> int:
    """Bytes of the parameters of the model of `cfg`. Nothing is allocated."""
    return parameter_bytes(_make_model(cfg, torch.device("meta")))


def weights_key(cfg: DictConfig, device: torch.device) -> str:
    """Equal for configurations whose models have the same parameters, but for those of their routers."""
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    if not active(cfg.model):  # what is calibrated depends on them
        model = {key: value for key, value in model.items() if key not in ("top_k", "attention")}
    return digest([model, cfg.dtype.name, int(cfg.seed), str(device)])


_GIVEN_TO_WORKLOADS = ("model", "batch", "seq_len", "seed", "device", "dtype", "phase")


def check_available(cfg: DictConfig) -> tuple[torch.device, dict[str, str]]:
    """(the device of `cfg`, who would compute what there), if its parts can run there.

    No parameters are allocated and nothing is built. A few tokens show which backends of attention torch has there.

    Raises:
        UnavailableError: the device, the dtype on it, or an implementation cannot run here.
        ValueError: a key that a part refuses.
    """
    device = resolve_device(cfg)
    require_keys(locate(cfg.workload._target_), _own_keys(cfg.workload), "workload", given=_GIVEN_TO_WORKLOADS)
    model = _make_model(cfg, torch.device("meta"))
    decide(cfg, model, device, load=False)
    require_runnable(cfg, model, device)
    return device, implementation(cfg, model, device)


def implementation(cfg: DictConfig, model: nn.Module, device: torch.device) -> dict[str, str]:
    """Who computes the router and the experts of `model`, that of `cfg`, on `device`; empty without MoE layers."""
    if not (layers := moe_layers(model)):
        return {}
    router, experts, weights = layers[0].router, layers[0].experts, layers[0].weights
    with asked_of(cfg.execution.name):
        by_experts = of_all_passes(experts.implementation(x_T0, weights) for x_T0 in _rows_at_once(cfg, device))
    return {"router": router.implementation(), **by_experts}


def _rows_at_once(cfg: DictConfig, device: torch.device) -> list[Tensor]:
    """What a layer is given in each pass that has another number of tokens [T, 0]."""
    return [torch.empty(n, 0, dtype=DTYPES[cfg.dtype.name], device=device) for n in tokens_at_once(cfg)]


def builds_extension(by: Mapping[str, str], device: torch.device) -> bool:
    """Whether a run with these implementations (`check_available`) compiles the extension first."""
    is_of_it = by.get("router", "").startswith("cuda_ext") or "fused" in by.get("experts", "").split("+")
    return is_of_it and not extension.is_built(device)


def require_runnable(cfg: DictConfig, model: nn.Module, device: torch.device) -> None:
    """Raise `UnavailableError` if a part of `model` does not support the rest of the configuration on `device`.

    Raises:
        ValueError: the router needs its own MoE layer, but the model makes another; or see `check_declarations`.
    """
    router, load = option_name(cfg.router), cfg.workload.get("load", "native")
    kind = cfg.workload.get("phase", "forward")
    if kind != "forward" and not isinstance(model, TransformerDecoder):
        raise UnavailableError(
            f"workload.phase={kind} needs a model with a KV cache, which model={option_name(cfg.model)} does not "
            "have; use workload.phase=forward, or model=decoder_moe, transformer_decoder or checkpoint"
        )
    for layer in moe_layers(model):
        check_declarations(layer.router)
        if isinstance(layer.router, SoftMoE) and not isinstance(layer, SoftMoELayer):
            raise ValueError(
                f"router={router} needs its own MoE layer, but model={option_name(cfg.model)} makes another; create "
                "it with moe_lab.models.layer_kinds.make_moe_layer."
            )
        if layer.router.needs_token_ids and model.vocab_size is None:
            raise UnavailableError(
                f"router={router} needs token ids, but model={option_name(cfg.model)} takes hidden states; use a "
                "model with an embedding, such as decoder_moe"
            )
        if layer.router.looks_ahead and not getattr(model, "looks_ahead", False):
            raise UnavailableError(
                f"router={router} needs the hidden states of the layer before, which model={option_name(cfg.model)} "
                "does not have; use model=decoder_moe or checkpoint, with two layers or more"
            )
        if layer.router.scales_input and layer.weights.scale_E is not None:
            raise UnavailableError(
                f"router={router} multiplies the experts' inputs by its weights, and these experts have a scale of "
                "their outputs; use another router"
            )
        if isinstance(layer, SoftMoELayer) and (part := _part_of_a_sequence(cfg)) is not None:
            raise UnavailableError(f"router={router} mixes all tokens of a sequence, but {part} or another router")
        if forces(cfg) and isinstance(layer, SoftMoELayer):
            key, remedy = (f"workload.load={load}", "workload.load=native")
            if load == "native":
                key, remedy = "model.timed=experts", "model.timed=layer"
            raise UnavailableError(
                f"{key} cannot be used with router={router}, where every token uses every expert; use "
                f"{remedy} or another router"
            )
        if load != "native" and not layer.router.static_k:
            undeclared = "which does not declare static_k (the same number of experts for every token); declare it, or "
            varies = "which uses a variable number of experts per token; "
            raise UnavailableError(
                f"workload.load={load} cannot be used with router={router}, "
                f"{undeclared if layer.router.static_k is None else varies}use workload.load=native or another router"
            )
    prefill_backends(cfg, model, device)
    step_backends(cfg, model, device)
    _require_computable(cfg, model, device)
    _require_capturable(cfg, model)


def _part_of_a_sequence(cfg: DictConfig) -> str | None:
    """What a pass has of a sequence if that is not all of it, and how to have all."""
    kind = cfg.workload.get("phase", "forward")
    if kind == "decode":
        return "a decode step has one; use workload.phase=forward or prefill,"
    if kind == "prefill" and len(prefill_passes(cfg)) > 1:
        return "a chunk has some of them; use workload.prefill_chunk=null"
    return None


def _require_computable(cfg: DictConfig, model: nn.Module, device: torch.device) -> None:
    """Raise `UnavailableError` if the experts do not compute the dtype, the sizes, biases or the activation."""
    for layer in moe_layers(model)[:1]:  # they are the same everywhere
        try:
            if layer.experts.only_plain:
                require_plain(layer.weights)
            for x_T0 in _rows_at_once(cfg, device):
                layer.experts.implementation(x_T0, layer.weights)
        except UnavailableError as error:
            raise UnavailableError(f"experts={option_name(cfg.experts)}: {error}") from error


def _require_capturable(cfg: DictConfig, model: nn.Module) -> None:
    """Raise `UnavailableError` if a part of `model` synchronises with the host and `cfg.execution` captures."""
    if cfg.execution.name != "eager" and (part := not_capturable(cfg, model)) is not None:
        raise UnavailableError(
            f"{part} synchronises with the host, so it cannot be captured by "
            f"execution={cfg.execution.name}; use execution=eager or another implementation"
        )


def not_capturable(cfg: DictConfig, model: nn.Module) -> str | None:
    """The first part of `model` that no CUDA graph can hold, as `router=base`; None if there is none."""
    for layer in moe_layers(model):
        for group, part in (("experts", layer.experts), ("router", layer.router)):
            undeclared_router = part.graph_safe is None  # its capture will show
            if not part.graph_safe and not undeclared_router:
                return f"{group}={option_name(cfg[group])}"
    return None


def build_input(
    cfg: DictConfig,
    model: nn.Module,
    device: torch.device,
    *,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """The one input of `model` that `cfg.workload` gives; batch, length and seed are those of `cfg` unless given.

    Raises:
        ValueError: the workload does not fit the model.
    """
    seq_len = seq_len or n_positions(cfg)
    longest = getattr(model, "max_positions", None)
    if longest is not None and seq_len > longest:
        raise ValueError(
            f"seq_len={cfg.seq_len}: with workload.phase={cfg.workload.phase} a sequence has {seq_len} tokens, but the "
            f"model supports at most {longest}; lower seq_len"
            f"{' or workload.context_len' if cfg.workload.phase == 'decode' else ''}."
        )
    x: Tensor = instantiate(
        OmegaConf.masked_copy(cfg.workload, ["_target_", *_own_keys(cfg.workload)]),
        "workload",
        model=model,
        batch=batch or cfg.batch,
        seq_len=seq_len,
        seed=cfg.seed if seed is None else seed,
        device=device,
        dtype=DTYPES[cfg.dtype.name],
        phase=cfg.workload.phase,
    )
    return x


def _own_keys(workload: DictConfig) -> list[str]:
    """What not every workload has: arguments of its function."""
    return [str(key) for key in workload if key != "_target_" and key not in Workload.__dataclass_fields__]


def build_task(cfg: DictConfig, model: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[Routing, ...] | None]:
    """What is timed: the model itself, or a phase of serving it; and the routing of the cached context, if any.

    Raises:
        UnavailableError: the model keeps no keys and values.
    """
    kind = cfg.workload.get("phase", "forward")
    if kind == "forward":
        if isinstance(model, TransformerDecoder):
            model.ropes.reserve(n_positions(cfg), x.device)
        return model, None
    assert isinstance(model, TransformerDecoder)  # `require_runnable` has looked
    cache, chunk = model.make_cache(len(x), n_positions(cfg)), cfg.workload.get("prefill_chunk")
    if kind == "prefill":
        return Prefill(model, cache, chunk), None
    task = Decode(model, cache, cfg.workload.context_len, cfg.workload.get("window", 1), chunk=chunk)
    return task, task.fill(x)
