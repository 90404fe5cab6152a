"""How the k best experts of a token are chosen and weighed, for `ops/route.py` and whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """How experts are chosen and weighed; see ops/route.py.

    Attributes:
        score: softmax, sigmoid or sqrt_softplus.
        group_score: a group's score is its largest s + b (max) or the sum of its two largest (top2).
    """

    k: int
    score: str = "softmax"
    n_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalize: bool = True
    scale: float = 1.0
