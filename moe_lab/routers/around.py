"""A router around another: what it does not define itself is that of the router inside."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from moe_lab.routers.base import PROPERTIES, Router


class Around(Router):
    """Wraps `inner`. It declares and does what `inner` does, but for `select`, which a derived class defines."""

    def __init__(self, n_experts: int, top_k: int, *, inner: Router, impl: str):
        super().__init__(n_experts, top_k, impl)
        self.inner = inner
        for declared in (*PROPERTIES, "looks_ahead", "not_exportable"):
            setattr(self, declared, getattr(inner, declared))

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """See `Router.weigh`."""
        return self.inner.weigh(logits_TE, expert_ids_TK)

    def at_layer(self, layer: int) -> Self:
        """See `Router.at_layer`."""
        self.inner.at_layer(layer)
        return self

    def fit(self, logits_TE: Tensor) -> None:
        """See `Router.fit`: to the logits of the layer itself."""
        self.inner.fit(logits_TE)

    def implementation(self) -> str:
        """See `Router.implementation`."""
        return self.inner.implementation()

    def warnings(self, n_tokens: int) -> list[str]:
        """See `Router.warnings`."""
        return self.inner.warnings(n_tokens)
