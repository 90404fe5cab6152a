"""A token's experts, guessed from something else.

All but `target_id` and `predicted_id` are known before the token's router runs.

Fitted on the other parts of a trace (routes.View.part):

    popular           the k experts that the layer uses most
    token_id          those that it uses most for this token id; the popular ones for an id that was not seen
    target_id         the same for the id of the token that follows
    predicted_id      the same for the id that the model thinks the likeliest to follow, as the trace recorded it
    layer_before      the k experts e of the largest sum of P(e | e') over e', its experts in the layer before

Not fitted:

    previous_token    the experts of the token before in its sequence
    ahead             the k first choices of the layer's router for the hidden states of the layer before, as the trace
                      recorded them (runs/guesses.py); ahead_2k: twice as many
    pre_attention     the same for the state before the layer's attention; pre_attention_2k

Of two experts alike the one with the smaller number is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from moe_lab.analyses.routes import Routes, View

IDS = ("token_id", "target_id", "predicted_id")
"""Those that are made from an id in the vocabulary."""
KNOWN_LATER = ("target_id", "predicted_id")
"""Those that nobody has when the token's router runs."""
_AT_ONCE = 1 << 16  # tokens


def guess(name: str, routes: Routes) -> np.ndarray | None:
    """Ids [T, K], -1 where nothing is guessed; None if the trace does not have what the guess is made from."""
    return _GUESSES[name](routes)


def uses(routes: Routes) -> np.ndarray:
    """Tokens of each part that use each expert, [P, E]."""
    view, ids_TK, E = routes.view, routes.ids_TK, routes.layer.n_experts
    return _counts(view.part[view.unit][:, None] * E + ids_TK, ids_TK >= 0, (len(view.parts), E))


def _counts(cells: np.ndarray, chosen: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often each cell was chosen, numbered row by row."""
    return np.bincount(cells[chosen], minlength=shape[0] * shape[1]).reshape(shape)


def _largest(scores_NE: np.ndarray, k: int) -> np.ndarray:
    """The k experts of the largest scores, of two alike the one with the smaller number, [N, k]."""
    order_NE: np.ndarray = np.argsort(-scores_NE, axis=1, kind="stable")
    return order_NE[:, :k]


def _elsewhere(counts_PE: np.ndarray) -> np.ndarray:
    """What the other parts count; of the only part its own."""
    others_PE: np.ndarray = counts_PE.sum(axis=0) - counts_PE
    return others_PE if len(counts_PE) > 1 else counts_PE


def _popular(routes: Routes) -> np.ndarray:
    guess_PK = _largest(_elsewhere(uses(routes)), routes.ids_TK.shape[1])
    return np.asarray(guess_PK[routes.view.part[routes.view.unit]])


def ids_of(view: View, name: str) -> np.ndarray | None:
    """The ids [T] that one of `IDS` is made from, -1 where one is not known; None if none is."""
    found = {"token_id": view.token, "target_id": view.target, "predicted_id": view.of_tokens.get("predicted")}[name]
    return None if found is None or (found < 0).all() else found


def _by_id(routes: Routes, name: str) -> np.ndarray | None:
    view, ids_TK, E = routes.view, routes.ids_TK, routes.layer.n_experts
    of_tokens = ids_of(view, name)
    if of_tokens is None:
        return None
    known_V, id_T = np.unique(of_tokens, return_inverse=True)
    shape, guess_TK = (len(known_V), E), np.empty_like(ids_TK)
    cell_TK, used_TK, part_T = id_T[:, None] * E + ids_TK, ids_TK >= 0, view.part[view.unit]
    used_TK &= (of_tokens >= 0)[:, None]  # nothing is seen of an id that is not known
    total_VE = _counts(cell_TK, used_TK, shape)
    for part, popular_E in enumerate(_elsewhere(uses(routes))):
        here_T = part_T == part
        seen_VE = total_VE - _counts(cell_TK[here_T], used_TK[here_T], shape) if len(view.parts) > 1 else total_VE
        guess_VK = _largest(seen_VE + popular_E / (popular_E.sum() + 1), ids_TK.shape[1])
        guess_TK[here_T] = guess_VK[id_T[here_T]]
    return guess_TK


def _previous(routes: Routes) -> np.ndarray:
    previous_TK = np.concatenate([routes.ids_TK[:1], routes.ids_TK[:-1]])
    previous_TK[routes.view.is_first] = -1
    return previous_TK


def _by_layer_before(routes: Routes) -> np.ndarray | None:
    if routes.before is None:
        return None
    view, ids_TK, before_TK = routes.view, routes.ids_TK, routes.before.ids_TK
    E, B = routes.layer.n_experts, routes.before.layer.n_experts
    part_T, P = view.part[view.unit], len(view.parts)
    flow_PBE = np.zeros((P, B, E))
    for before_T in before_TK.T:
        for ids_T in ids_TK.T:
            used = (before_T >= 0) & (ids_T >= 0)
            cells = (part_T * B + before_T) * E + ids_T
            flow_PBE += np.bincount(cells[used], minlength=P * B * E).reshape(P, B, E)
    seen_PBE = flow_PBE.sum(axis=0) - flow_PBE if P > 1 else flow_PBE
    given_PBE = seen_PBE / np.maximum(_elsewhere(uses(routes.before)), 1)[:, :, None]
    guess_TK = np.empty_like(ids_TK)
    for first in range(0, len(ids_TK), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        scores_TE = np.zeros((len(ids_TK[rows]), E))
        for before_T in before_TK[rows].T:
            scores_TE += np.where((before_T >= 0)[:, None], given_PBE[part_T[rows], before_T], 0)
        guess_TK[rows] = _largest(scores_TE, ids_TK.shape[1])
    return guess_TK


def _recorded(routes: Routes, name: str, times_k: int) -> np.ndarray | None:
    guess_TW = routes.guesses.get(name)
    if guess_TW is None or (guess_TW < 0).all():
        return None
    return guess_TW[:, : times_k * routes.ids_TK.shape[1]]


_GUESSES: dict[str, Callable[[Routes], np.ndarray | None]] = {
    "popular": _popular,
    **{name: partial(_by_id, name=name) for name in IDS},
    "previous_token": _previous,
    "layer_before": _by_layer_before,
    "ahead": partial(_recorded, name="ahead", times_k=1),
    "ahead_2k": partial(_recorded, name="ahead", times_k=2),
    "pre_attention": partial(_recorded, name="pre_attention", times_k=1),
    "pre_attention_2k": partial(_recorded, name="pre_attention", times_k=2),
}
GUESSES = tuple(_GUESSES)
RECORDED = {name: name.removesuffix("_2k") for name in ("ahead", "ahead_2k", "pre_attention", "pre_attention_2k")}
"""Those that only some traces have, and their column."""
