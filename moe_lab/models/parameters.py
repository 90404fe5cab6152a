"""Initial parameters from an integer hash, and modules that share them.

A checkpoint's come from its files. In every other model each element is a function of (seed, state_dict name, expert,
index): the same for every device, dtype (rounded), router and implementation, with no fp32 copy and no random
generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from moe_lab.ops.hash_uniform import fill_uniform, stream_of
from moe_lab.routers.base import Router


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place; a checkpoint loads its own.

    Matrices [..., out, in] have standard deviation 1/sqrt(in), the embedding 1; norms are 1 +- 0.1 and other vectors
    +-0.1, so that a kernel that forgets one of them is found out. [E, out, in] is filled expert by expert.
    """
    _fill_all(model, dict(model.named_parameters()), seed)


def _fill_all(model: nn.Module, parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fill parameters of `model`, by name; one that has values of its own (a checkpoint) loads them."""
    load = getattr(model, "load_parameters", None)
    if load is not None:
        load(parameters)
        return
    for name, parameter in parameters.items():
        _fill(name, parameter, seed)


def _fill(name: str, parameter: Tensor, seed: int) -> None:
    bound, centre = _range(name, parameter)
    experts = parameter if parameter.dim() == 3 else parameter.unsqueeze(0)
    for expert, values in enumerate(experts):
        fill_uniform(values.data, stream_of(seed, name, expert), bound, centre)


def _range(name: str, parameter: Tensor) -> tuple[float, float]:
    """(bound, centre) of the uniform distribution; uniform(-b, b) has the standard deviation b / sqrt(3)."""
    if parameter.dim() == 1:
        return 0.1, (1.0 if "norm" in name else 0.0)
    if name.endswith("embed.weight"):
        return math.sqrt(3), 0.0
    return math.sqrt(3 / parameter.shape[-1]), 0.0


@contextmanager
def without_storage() -> Iterator[None]:
    """Parameters that modules register inside are on the meta device: they have sizes and take no memory."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is; a tied parameter stays the same object
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class Donor(dict[str, Tensor]):
    """Parameters by name, which another model may share."""

    changes: Any = None
    """How they were changed, if they were (`runs.weight_changes.WeightChanges`)."""


def shareable(model: nn.Module) -> Donor:
    """The parameters, by name, that a model with another router may share: all but those of the routers.

    A router's are its own: they are few, and one that is calibrated writes into them.
    """
    own = {id(tensor) for router in model.modules() if isinstance(router, Router) for tensor in router.parameters()}
    donor = Donor({name: tensor for name, tensor in model.named_parameters() if id(tensor) not in own})
    donor.changes = getattr(model, "weight_changes", None)
    return donor


def adopt(model: nn.Module, donor: Mapping[str, Tensor], device: torch.device, seed: int) -> None:
    """Share `donor`'s parameters, by name, with a model made `without_storage`; fill those that it does not have.

    The caller must make sure that a donor's parameter of the same name, size and dtype has the same values: they are
    a function of seed and name, or of a checkpoint and name.
    """
    adopted: dict[int, Tensor] = {}
    missing: dict[str, Tensor] = {}
    for name, empty in model.named_parameters():
        tensor = donor.get(name)
        if tensor is None or tensor.shape != empty.shape or tensor.dtype != empty.dtype:
            tensor = missing[name] = nn.Parameter(torch.empty_like(empty, device=device), requires_grad=False)
        adopted[id(empty)] = tensor
    _fill_all(model, missing, seed)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = adopted[id(parameter)]  # type: ignore[assignment]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers are the very tensors of `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def copied_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose parameters and buffers lie on `device`; tied ones stay tied."""

    def moved(tensor: Tensor) -> Tensor:
        there = tensor.to(device)
        return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there

    return copy.deepcopy(model, {id(tensor): moved(tensor) for tensor in (*model.parameters(), *model.buffers())})


def reference_twin(model: nn.Module) -> nn.Module:
    """The fp32 reference of `model`: the same tensors, every module on its plain-torch implementation."""
    twin = shared_copy(model)
    for module in twin.modules():
        use_reference = getattr(module, "use_reference", None)
        if use_reference is not None:
            use_reference()
    return twin


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; a shared one counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
