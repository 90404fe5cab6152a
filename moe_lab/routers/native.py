"""router=native: the router that a checkpoint was trained with."""

from __future__ import annotations

from moe_lab.routers.base import Router


def native(n_experts: int, top_k: int, *, impl: str) -> Router:
    """What `router=native` is for a model that is no checkpoint (see `runs.trained`).

    Raises:
        ValueError: always.
    """
    raise ValueError("router=native: only for model=checkpoint; choose another router.")
