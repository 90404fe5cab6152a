"""experts=transformers: the experts of transformers' models, in each of its implementations (`experts.impl`).

grouped_mm  sorts the slots, then torch's grouped product    batched_mm  a copy of the matrices for every slot
deepgemm, sonicmoe  kernels that transformers fetches from the Hugging Face hub
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_lab.config.schemas import TRANSFORMERS_EXPERTS
from moe_lab.errors import UnavailableError
from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.weights import ExpertWeights


class Transformers(Peer):
    """A stand-in for its module of experts holds our matrices, which have its layout."""

    distribution = "transformers"
    modules = ("transformers.integrations.moe",)
    function = "use_experts_implementation"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    multiple = 1

    def __init__(self, *, impl: str):
        if impl not in TRANSFORMERS_EXPERTS:
            raise ValueError(f"experts.impl={impl}: must be one of {', '.join(TRANSFORMERS_EXPERTS)}.")
        self.impl = impl
        if self._is_fetched:
            self.dtypes, self.multiple = (torch.bfloat16,), 64

    @property
    def _is_fetched(self) -> bool:
        return self.impl in ("deepgemm", "sonicmoe")

    def require_device(self, device: torch.device) -> None:
        """See `Peer`: torch's products run on every device."""
        if self._is_fetched:
            with self._named():
                super().require_device(device)

    def require(self, dtype: torch.dtype, D: int, F: int) -> None:
        """See `Peer`."""
        with self._named():
            super().require(dtype, D, F)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What one implementation needs is not said of all."""
        try:
            yield
        except UnavailableError as error:
            raise UnavailableError(f"experts.impl={self.impl}: {error}") from error

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """See `Experts`."""
        super().compute_on(device, load=load)
        if not self._is_fetched:
            return
        integration: Any = getattr(__import__("transformers.integrations", fromlist=[self.impl]), self.impl)
        try:
            getattr(integration, f"is_{self.impl}_loadable")(raise_error=True)
            if load:
                getattr(integration, f"load_{self.impl}_kernel")()
        except Exception as error:  # the hub cannot be reached, say
            why = " ".join(str(error).split())
            raise UnavailableError(f"experts.impl={self.impl}: {why}; pip install kernels") from error

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: as `transformers 5.17.0 grouped_mm`."""
        return {"experts": f"{super().implementation(x_TD, weights)['experts']} {self.impl}"}

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        module = _stand_in(self.kernels())(SimpleNamespace(_experts_implementation=self.impl, hidden_act="silu"))
        module.num_experts, module.gate_up_proj, module.down_proj = len(down_EDF), up_E2FD, down_EDF
        result: Tensor = module.forward(x_TD, ids_TK, weights_TK)
        return result


@cache
def _stand_in(integration: Any) -> Any:
    """What its decorator makes of a class without parameters: `forward` calls the implementation of its config."""

    class StandIn:
        act_fn = staticmethod(silu)

        def __init__(self, config: Any):
            self.config = config

        def forward(self, *arguments: Tensor) -> Tensor:
            raise AssertionError("the decorator replaces it")

    return integration.use_experts_implementation(StandIn)
