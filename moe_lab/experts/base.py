"""The seam every way to compute the experts fills: `Experts`. `FunctionExperts` puts a plain function behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from moe_lab.config.targets import require_keys
from moe_lab.errors import UnavailableError
from moe_lab.experts.weights import ExpertWeights, Scale
from moe_lab.routers.base import Routing


class Experts:
    """One way to compute the expert MLPs of a layer; the formula is in `moe_lab.experts`.

    The keys of the option's YAML are the arguments of `__init__`, which raises `ValueError` for a value that it does
    not take. An object keeps its keys and no other state, because all layers of a model share it.
    """

    graph_safe = False
    """No host synchronisation and fixed shapes: a class must declare this to be captured in a graph."""

    only_plain = True
    """Of `ExpertWeights` only the matrices are read. A class that reads biases and activation too sets this to False;
    no other is given experts that have them."""

    def for_layer(self, weights: ExpertWeights, top_k: int, *, static_k: bool = False) -> Self:
        """What computes a layer with such weights, `top_k` experts a token: itself, unless it chooses by that.

        With `static_k` no slot will be unused.
        """
        return self

    def chosen(self, x_TD: Tensor) -> Experts:
        """What computes such an input, by its dtype and number of tokens: itself, unless it passes the call on."""
        return self

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """Be ready to compute on `device`; with `load` false, only say whether that is possible.

        Raises:
            UnavailableError: this implementation cannot run there.
        """

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """The weighted sum of each token's experts, [T, D] in x's dtype.

        Args:
            x_TD: hidden states of any floating dtype.
            routing: int32 ids and float32 weights [T, K]; the weight beside an id of -1 is not read.
            weights: the matrices, of x's dtype; they are neither changed nor copied.
            scale: whether the routing weight multiplies the expert's output or its input.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x_TD, routing, weights, *, scale)")

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        """Whether such an input is computed from `Routing.dispatch`; a router that can then makes it.

        Of `x_TD` only the device, the dtype and the number of tokens matter here and in `implementation`.
        """
        return False

    def warning(self, x_TD: Tensor) -> str | None:
        """What the record should say of such an input, for example that something else would be faster; or None."""
        return None

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """Which kernels compute such an input, for the record: `experts`, and a key for each op with a choice.

        Raises:
            UnavailableError: none of them can.
        """
        return {"experts": type(self).__name__.lower()}


def require_plain(weights: ExpertWeights) -> None:
    """Raise `UnavailableError` if the experts are more than SwiGLU: for an implementation that reads only matrices."""
    if weights.is_plain:
        return
    has = ["biases"] if weights.up_bias_E2F is not None else []
    has += [str(weights.activation)] if weights.activation is not None else []
    raise UnavailableError(f"computes SwiGLU experts only, and these have {' and '.join(has)}; use experts=auto")


class FunctionExperts(Experts):
    """A function `f(x_TD, routing, weights, *, scale, ...)`. It declares nothing: not graph safe, no sorted slots."""

    def __init__(self, function: Callable[..., Tensor], /, **keys: Any):
        """`keys` go to the function at each call, beside what `Experts.__call__` is given.

        Raises:
            ValueError: the function does not take a key, or needs one that is not given.
        """
        require_keys(function, keys, "experts", given=("scale",), n_given=3)
        self.function, self.name = partial(function, **keys), function.__name__

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`."""
        require_plain(weights)
        return self.function(x_TD, routing, weights, scale=scale)

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """The function's name."""
        return {"experts": self.name}
