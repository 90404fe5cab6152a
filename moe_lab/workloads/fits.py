"""Loads that are fitted to a trace: a power law of the experts' shares, and a Dirichlet distribution of a step's.

The tokens of a layer, in the order in which they were computed, are cut into steps of as many tokens. With c_r the
slots of the expert of rank r (by load) in all of them, N their sum, n the slots of a step, s_e the share of expert e in
one:

    zipf_exponent    a of the shares r^-a / sum r^-a, of the largest likelihood: sum_r c_r ln r / N equals the mean of
                     ln r under these shares (Clauset et al. 2009, 0706.1062, here of a bounded range)
    concentration    A of s ~ Dirichlet(A m), m the mean shares, by moments of the Dirichlet-multinomial: with
                     rho = sum_e var(s_e) / sum_e m_e (1 - m_e), A = n (1 - rho) / (n rho - 1). The smaller, the more
                     the steps differ; none if they differ less than draws by chance would

`workload.load=fitted` makes these loads, and `moe-lab analyze` (load_fit) says how like the trace they are. No torch.
"""

from __future__ import annotations

import numpy as np

MOST_EXPONENT = 20.0
"""Above, one expert has all."""


def step_counts(ids_TK: np.ndarray, n_experts: int, step_tokens: int) -> np.ndarray:
    """Slots of each step and expert, int64 [S, E]; tokens that do not fill a step are left out."""
    S = len(ids_TK) // step_tokens
    ids_TK = ids_TK[: S * step_tokens]
    cell_TK = np.repeat(np.arange(S), step_tokens)[:, None] * n_experts + ids_TK
    return np.bincount(cell_TK[ids_TK >= 0], minlength=S * n_experts).reshape(S, n_experts)


def zipf_shares(n_experts: int, exponent: float) -> np.ndarray:
    """r^-exponent, r = 1 .. E, of which the sum is 1."""
    shares_E = np.arange(1, n_experts + 1, dtype=float) ** -exponent
    return np.asarray(shares_E / shares_E.sum())


def zipf_exponent(counts_E: np.ndarray) -> float:
    """The exponent of the largest likelihood, by bisection; 0 for even counts."""
    ranks_E = np.log(np.arange(1, len(counts_E) + 1))
    wanted = float((np.sort(counts_E)[::-1] * ranks_E).sum() / counts_E.sum())
    low, high = 0.0, MOST_EXPONENT
    for _ in range(60):
        middle = (low + high) / 2
        shares_E = zipf_shares(len(counts_E), middle)
        low, high = (middle, high) if float((shares_E * ranks_E).sum()) > wanted else (low, middle)
    return low


def concentration(counts_SE: np.ndarray) -> float | None:
    """A of the Dirichlet-multinomial; None if the steps differ less than by chance."""
    n = float(counts_SE.sum(axis=1).mean())
    shares_SE = counts_SE / counts_SE.sum(axis=1, keepdims=True)
    m_E = shares_SE.mean(axis=0)
    most = float((m_E * (1 - m_E)).sum())  # the variance, if each step had one expert
    if not most:
        return None
    rho = float(shares_SE.var(axis=0, ddof=1).sum()) / most
    return n * (1 - rho) / (n * rho - 1) if n * rho > 1 and rho < 1 else None


def drawn_counts(counts_SE: np.ndarray, slots: int, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Slots of each expert in steps of `slots` slots, drawn from what is fitted to the steps `counts_SE`, [n, E].

    Shares from Dirichlet(A m), m where A is None, and slots from these shares.
    """
    A, m_E = concentration(counts_SE), counts_SE.sum(axis=0) / counts_SE.sum()
    shares_NE = rng.dirichlet(np.maximum(A * m_E, 1e-6), n_draws) if A is not None else np.tile(m_E, (n_draws, 1))
    return np.asarray(rng.multinomial(slots, shares_NE))
