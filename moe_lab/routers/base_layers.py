"""router=base: the assignment with the largest sum of logits among those that load every expert alike.

    max sum_te x_te l_te   with  sum_e x_te = k,  floor(T k / E) <= sum_t x_te <= ceil(T k / E),  0 <= x_te <= 1
    w_e = sigmoid(l_e)

BASE layers (Lewis et al. 2021, 2103.16716) are k = 1. The linear programme is that of a transport problem, whose
vertices are integers, so its simplex solution is an assignment. What it keeps of the top-k's sum of logits is the most
that any router can keep at perfect balance. It is solved on the host (scipy's HiGHS): a yardstick for small sizes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops.softmax_topk import chosen, top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, check_finite


class BASELayers(Router):
    """See the module; at T = 1 it is the plain top-k."""

    static_k = True
    causal = False
    batch_invariant = False
    graph_safe = False
    implementations = ("scipy",)
    not_exportable = "an assignment solver on the host chooses the experts"

    def __init__(self, n_experts: int, top_k: int, *, impl: str):
        super().__init__(n_experts, top_k, impl)
        try:
            import scipy.optimize  # noqa: F401
        except ImportError as error:
            raise UnavailableError("scipy not found; pip install scipy") from error

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is l less the expert's price, of which the k largest are chosen."""
        check_finite(logits_TE, ctx.layer, every_entry=True)
        chosen_TE, price_E = assign(logits_TE.double().cpu().numpy(), self.top_k)
        taken_TE = torch.from_numpy(chosen_TE).to(logits_TE.device)
        ids_TK = top_k(logits_TE.float().masked_fill(~taken_TE, -torch.inf), self.top_k)
        scores_TE = None
        if ctx.want_scores:
            scores_TE = (logits_TE.double() - torch.from_numpy(price_E).to(logits_TE.device)).float()
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return chosen(logits_TE.float().sigmoid(), expert_ids_TK)

    def use_reference(self) -> None:
        """It is its own reference: scipy's solution in float64."""


def assign(logits_TE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(which experts each token gets, bool [T, E]; the price of each expert, float64 [E]) of finite logits."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    T, E = logits_TE.shape
    if T == 0 or k == E:
        return np.ones((T, E), dtype=bool), np.zeros(E)
    rows = csr_array(kron(eye_array(T), np.ones((1, E))))
    columns = csr_array(kron(np.ones((1, T)), eye_array(E)))
    least, most = math.floor(T * k / E), math.ceil(T * k / E)
    # From the largest 0 on: what all entries share changes nothing but the rounding.
    solution = linprog(
        -(logits_TE - logits_TE.max()).ravel(),
        A_eq=rows,
        b_eq=np.full(T, k),
        A_ub=vstack([columns, -columns]),
        b_ub=np.concatenate([np.full(E, most), np.full(E, -least)]),
        bounds=(0, 1),
        method="highs-ds",
    )
    assert solution.status == 0, solution.message
    price_E = -(solution.ineqlin.marginals[:E] - solution.ineqlin.marginals[E:])
    return solution.x.reshape(T, E) > 0.5, price_E
