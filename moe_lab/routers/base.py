"""The seam every router fills: `Routing`, `RouteContext`, `Router`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension
from moe_lab.ops.dispatch import Dispatch
from moe_lab.ops.library import resolve_implementation
from moe_lab.ops.route_peers import PEERS
from moe_lab.ops.route_peers import require as require_peer
from moe_lab.records import fields


class Routing(NamedTuple):
    """Where each token goes.

    expert_ids_TK: int32, -1 = unused slot; ties go to the lowest expert id.
    weights_TK: float32, 0 where the id is -1.
    dispatch: the slots sorted by expert, where the router already made them.
    scores_TE: what the selection ranked, float32, when asked for.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    dispatch: Dispatch | None = None
    scores_TE: Tensor | None = None


class RouteContext(NamedTuple):
    """What a router may know beside the logits; shapes are fixed, so that a captured graph can hold it.

    token_ids_T: int64 ids of the tokens, None where the model is fed hidden states.
    valid_T: bool, False for padding; None: all are valid.
    seq_start_B1: int32 [B + 1], first token of each sequence.
    layer: index of the layer, for messages and tables.
    phase: forward, prefill or decode.
    want_scores: fill `Routing.scores_TE`.
    want_dispatch: the experts read `Routing.dispatch`; a router whose kernel can fills it.
    previous_TD: what the MLP of the layer before read, for routers that look ahead; None in the first layer, in models
        of one layer, and for other routers.
    guess_TE: this layer's logits for `previous_TD`, in its dtype; None where that is.
    """

    token_ids_T: Tensor | None = None
    valid_T: Tensor | None = None
    seq_start_B1: Tensor | None = None
    layer: int = 0
    phase: str = "forward"
    want_scores: bool = False
    want_dispatch: bool = False
    previous_TD: Tensor | None = None
    guess_TE: Tensor | None = None


NO_CONTEXT = RouteContext()

FASTEST_FIRST = {"cuda": ("cuda_ext", "triton", "torch"), "cpu": ("torch",)}
"""What auto tries where kernels of all three exist: measured in docs/results/h200/routers.csv. On a CPU the extension
needs a compiler and half a minute to build, so it is there for who asks."""


def fastest(device: torch.device) -> str:
    """The first of `FASTEST_FIRST` that is usable on `device`: what auto means there for a router that has them all."""
    if device.type == "cuda" and extension.why_unavailable(device) is None:
        return "cuda_ext"
    return resolve_implementation("auto", device, op="router.impl")


PROPERTIES = fields.names(fields.PROPERTIES)
"""What a router declares, as attributes."""


class Router(nn.Module):
    """Selection only: a router owns its biases and tables, never the gate.

    The class attributes declare what is true of every instance; tests hold routers to them.
    """

    needs_token_ids = False  # reads ctx.token_ids_T
    # None: not declared, so nobody relies on it. A run verifies the first three where they are declared.
    causal: bool | None = None  # later tokens change no earlier route
    batch_invariant: bool | None = None  # a token's route does not depend on the tokens beside it
    static_k: bool | None = None  # every token fills all K slots
    graph_safe: bool | None = None  # no host synchronisation, fixed shapes; None: a capture will show
    scales_input = False  # the weight multiplies the expert's input, not its output
    looks_ahead = False  # reads ctx.guess_TE
    calibrates = False  # `fit` must be called once, with the logits of a workload, before `select`

    not_exportable: str | None = None
    """Why no ONNX graph can say `select`; None: one can."""

    implementations: tuple[str, ...] = ("torch",)
    """Who can compute `select`; `auto` takes the first unless `preferred` says otherwise."""

    def __init__(self, n_experts: int, top_k: int, impl: str = "auto"):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k}: must be between 1 and n_experts={n_experts}.")
        if impl != "auto" and impl not in self.implementations:
            raise UnavailableError(
                f"router.impl={impl}: {type(self).__name__} has the implementations "
                f"{', '.join(self.implementations)} only; use one of them or router=torch"
            )
        self.n_experts, self.top_k, self.asked = n_experts, top_k, impl
        self.label = self.impl = "torch" if impl in ("auto", "torch") else "undecided"
        self.fallback: str | None = None

    def compute_on(self, device: torch.device, *, load: bool = True) -> Self:
        """Decide who computes `select` on `device`: `asked`, or with auto the first of `preferred` that can.

        Until then plain torch computes, and a kernel that was asked for nothing. With `load` false nothing is built or
        loaded, to see what would compute. Where auto takes another than the first because the extension does not
        compile, `fallback` says so.

        Raises:
            UnavailableError: what was asked for cannot compute this here.
        """
        if self.asked != "auto":
            self._be(self.asked, device, load)
            return self
        for impl in self.preferred(device):
            try:
                self._be(impl, device, load)
                return self
            except extension.BuildError:
                self.fallback = extension.why_unavailable(device)
            except UnavailableError:
                continue
        raise AssertionError(f"{type(self).__name__}: none of {self.preferred(device)} runs on {device}")

    def _be(self, impl: str, device: torch.device, load: bool) -> None:
        self.require(impl, device)
        if impl == "cuda_ext" and load:
            extension.load()
        self.impl = impl
        self.label = extension.label(device) if impl == "cuda_ext" else impl

    def preferred(self, device: torch.device) -> Sequence[str]:
        """What auto tries on `device`, the fastest first; the last can always compute."""
        return self.implementations

    def require(self, impl: str, device: torch.device) -> None:
        """Raise `UnavailableError` unless `impl`, one of `implementations`, can compute this router on `device`."""
        if impl == "cuda_ext":
            try:
                extension.require(device)
            except UnavailableError as error:
                raise type(error)(f"router.impl=cuda_ext: {error}; or use router=torch") from error
        if impl in PEERS:
            require_peer(impl, device)
        if impl == "triton":
            resolve_implementation(impl, device, op="router.impl")

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """The routing of logits [T, E] of any floating dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define select(logits_TE, ctx)")

    def route(self, x_TD: Tensor, gate_ED: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """The routing of hidden states [T, D] by the gate [E, D]."""
        return self.select(gate_logits(x_TD, gate_ED), ctx)

    def forward(
        self, x_TD: Tensor, gate_ED: Tensor, ctx: RouteContext = NO_CONTEXT, gate_bias_E: Tensor | None = None
    ) -> Routing:
        """`route`, or `select` where the gate has a bias; an exported graph has a node for each call of a module."""
        if gate_bias_E is not None:
            return self.select(gate_logits(x_TD, gate_ED, gate_bias_E), ctx)
        return self.route(x_TD, gate_ED, ctx)

    def multiplies_gate(self, n_tokens: int, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """Whether `route` of so many tokens in this dtype is done by kernels of its own, the gate's product too."""
        return False

    def norms_input(self, n_tokens: int, norm_weight_D: Tensor, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """Whether the kernels of `multiplies_gate` also norm what they read (`norm_and_route`)."""
        return False

    def norm_and_route(
        self, x_TD: Tensor, residual_TD: Tensor, norm_weight_D: Tensor, eps: float, gate_ED: Tensor
    ) -> tuple[Tensor, Tensor, Routing]:
        """The two results of `add_rms_norm`, and `route` of the first; only called where `norms_input`."""
        raise NotImplementedError(f"{type(self).__name__} must define norm_and_route, for it says norms_input")

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """The weights [T, K] this router gives to experts already chosen, if they follow from the logits; else None.

        An id of -1 weighs 0.

        Verification asks for them where the choice was a near-tie and the run's own fell otherwise.
        """
        return None

    def at_layer(self, layer: int) -> Self:
        """Told once which layer of a model it is in; what it has no use for there it need not have."""
        return self

    def fit(self, logits_TE: Tensor) -> None:
        """Fit to the logits of a calibration pass, once; for routers that declare `calibrates`."""

    def implementation(self) -> str:
        """Who computes `select`, as it stands in the record: `cuda_ext:sm_90`, say."""
        return self.label

    def warnings(self, n_tokens: int) -> list[str]:
        """What a reader of a result with this many tokens should know."""
        return []

    def use_reference(self) -> None:
        """From now on compute by the plain-torch reference."""
        self.impl = self.label = "torch"


_looks = True


@contextmanager
def unchecked() -> Iterator[None]:
    """Routers do not look for NaN inside: for timed blocks, whose input was looked at before."""
    global _looks
    before, _looks = _looks, False
    try:
        yield
    finally:
        _looks = before


def gate_logits(x_TD: Tensor, gate_ED: Tensor, gate_bias_E: Tensor | None = None) -> Tensor:
    """Router logits [T, E] in x's dtype."""
    return F.linear(x_TD, gate_ED.to(x_TD.dtype), None if gate_bias_E is None else gate_bias_E.to(x_TD.dtype))


def require_finite(logits_TE: Tensor, ctx: RouteContext, *, every_entry: bool = False) -> None:
    """Raise `ValueError` naming the layer if a row has no softmax: NaN, +inf or only -inf.

    With `every_entry` a single -inf (a masked expert) is refused too. Silent where looking would stop the device or
    break a captured graph (CUDA, torch.compile), and while a block is timed (`unchecked`): a run looks at its logits on
    every device once, before that.
    """
    if torch.compiler.is_compiling():  # first: a compiled pass must not depend on `_looks`
        return
    if _looks and logits_TE.device.type == "cpu":
        check_finite(logits_TE, ctx.layer, every_entry=every_entry)


def check_finite(logits_TE: Tensor, layer: int, *, every_entry: bool = False) -> None:
    """As `require_finite`, on every device; on CUDA it synchronises with the host."""
    if logits_TE.numel() == 0:
        return
    wide_TE = logits_TE.float()  # what the selection reads: float64 logits may overflow here
    good_T = wide_TE.isfinite().all(-1) if every_entry else wide_TE.amax(-1).isfinite()
    if not bool(good_T.all()):
        kind = "not finite" if every_entry else "NaN, +inf or all -inf"
        raise ValueError(
            f"layer {layer}: the router's logits are {kind} for {int((~good_T).sum())} of {len(good_T)} tokens "
            f"(first: token {int((~good_T).nonzero()[0, 0])}); check the layer's input and gate."
        )
