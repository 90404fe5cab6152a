"""Initial parameters from an integer hash, and modules that share them.

Each element is a function of (seed, state_dict name, expert, index): the same for every device, dtype (rounded), router
and implementation, with no fp32 copy and no random generator.
"""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from moe_lab.ops.hash_uniform import fill_uniform, stream_of


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place.

    Matrices [..., out, in] have standard deviation 1/sqrt(in), the embedding 1; norms are 1 +- 0.1 and other vectors
    +-0.1, so that a kernel that forgets one of them is found out. [E, out, in] is filled expert by expert.
    """
    for name, parameter in model.named_parameters():
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


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers are the very tensors of `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


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
