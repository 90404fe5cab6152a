"""What is traced: the modules of a run over the same tensors, in the form that a graph can hold."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lab.experts.exported import Exported
from moe_lab.models.layers import Embedding
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.parameters import shared_copy
from moe_lab.models.rope import Rope

WRAPPED = "model"
"""The attribute of `Form` that holds the model; scopes and initializers of the traced graph start with it."""


class Form(nn.Module):
    """x -> (y, the expert ids and weights of each MoE layer): what a graph gives."""

    def __init__(self, model: nn.Module, *, wide: bool):
        """`wide`: computes in fp32, casting the weights, whatever their dtype."""
        super().__init__()
        self.model = shared_copy(model)
        for module in self.model.modules():
            if isinstance(module, MoELayer):
                module.experts = Exported()
                module.router.use_reference()
            elif isinstance(module, Rope):
                module.tables_2Nd = None  # computed in the graph, for every length
            elif wide or not isinstance(module, Embedding):  # the reference of an embedding gives fp32
                getattr(module, "use_reference", lambda: None)()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, routings = self.model(x)
        return (y, *(tensor for routing in routings for tensor in routing[:2]))
