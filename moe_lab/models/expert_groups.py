"""Fewer experts in a layer: those with the lowest scores removed, or those alike merged.

Both are a list of groups: of which of the layer's experts each expert that is left consists. Removed, experts stand in
no group, and each group has one.

Merging is that of HC-SMoE (Chen et al. 2024, 2410.08589): hierarchical clustering with average linkage of the mean
outputs that experts give on the calibration text,

    d(A, B) = mean over i in A, j in B of || mean_x f_i(x) - mean_x f_j(x) ||_2,

the nearest two groups becoming one until as many are left as are wanted; a group's matrices are the mean of its
experts', weighted by how often each was chosen. There the gate keeps a row for each former expert. Here the merged
expert has one row, the same mean, so that the layer is a smaller one that every router and kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]


def without_lowest(scores_E: np.ndarray, n_removed: int) -> Groups:
    """All experts but the `n_removed` with the lowest scores; of equal ones the first ids stay."""
    order = np.argsort(-scores_E, kind="stable")
    return tuple((int(expert),) for expert in np.sort(order[: len(order) - n_removed]))


def clusters(vectors_ED: np.ndarray, n_groups: int) -> Groups:
    """The experts in `n_groups` groups by average linkage, sorted by their first; of equal distances the first."""
    groups: list[tuple[int, ...]] = [(expert,) for expert in range(len(vectors_ED))]
    gram_EE = vectors_ED @ vectors_ED.T
    squares_E = gram_EE.diagonal()
    distance_EE = np.sqrt(np.maximum(squares_E[:, None] + squares_E - 2 * gram_EE, 0))
    np.fill_diagonal(distance_EE, np.inf)
    while len(groups) > n_groups:
        i, j = sorted(divmod(int(distance_EE.argmin()), len(groups)))
        a, b = len(groups[i]), len(groups[j])
        distance_EE[i] = distance_EE[:, i] = (a * distance_EE[i] + b * distance_EE[j]) / (a + b)
        groups[i] = tuple(sorted(groups[i] + groups.pop(j)))
        distance_EE = np.delete(np.delete(distance_EE, j, 0), j, 1)
    return tuple(sorted(groups))


def grouped(w: Tensor, groups: Sequence[Sequence[int]], counts_E: np.ndarray) -> Tensor:
    """[E', ...] of [E, ...]: a group's mean weighted by `counts_E`, equally where none was chosen. A new tensor.

    A group of one is that expert to the bit; a mean is taken in float32.
    """
    result = w.new_empty(len(groups), *w.shape[1:])
    for index, group in enumerate(groups):
        if len(group) == 1:
            result[index] = w[group[0]]
            continue
        counts = counts_E[list(group)].astype(np.float64)
        shares = counts / counts.sum() if counts.any() else np.full(len(group), 1 / len(group))
        total = torch.zeros_like(w[0], dtype=torch.float32)
        for expert, share in zip(group, shares, strict=True):
            total += float(share) * w[expert].float()
        result[index] = total
    return result
