"""agreement.py: how far routes and outputs are from another router's, by hand and on whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.cli.table import print_records
from moe_lab.measure.agreement import WORSE, Difference, agreement
from moe_lab.measure.distance import relative_error
from moe_lab.models.moe_layer import moe_layers
from moe_lab.records.identity import cell_id
from moe_lab.routers.base import Routing
from moe_lab.runs import build
from moe_lab.runs.run import Run
from tests import quick, tiny


def routing(ids: list[list[int]], weights: list[list[float]]) -> Routing:
    """Of plain lists."""
    return Routing(torch.tensor(ids, dtype=torch.int32), torch.tensor(weights))


ONE = routing([[0, 1], [2, 3], [1, -1], [-1, -1]], [[0.6, 0.4], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
OTHER = routing([[1, 0], [3, 0], [2, 1], [-1, -1]], [[0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.0, 0.0]])


def test_the_measures_of_a_small_table_are_those_computed_by_hand() -> None:
    """Same set in another order; one in three; one in two; nothing against nothing."""
    y, other_y = torch.tensor([[3.0], [0.0], [0.0], [0.0]]), torch.tensor([[0.0], [4.0], [0.0], [0.0]])
    found = Difference.of(ONE, OTHER, y, other_y, 4).measures()
    assert found == pytest.approx(
        {
            "jaccard": (1 + 1 / 3 + 1 / 2 + 1) / 4,
            "same_experts": 2 / 4,
            "same_first_choice": 1 / 4,  # 0/1, 2 (the lower of a tie)/3, 1/2, none/none
            "combine_l1": (0.3 + 0.3 + (0.5 + 0.4 + 0.1) + (0.8 + 0.8) + 0) / 4,
            "rel_error": 5 / 4,
        },
        rel=1e-6,
    )


def test_a_routing_agrees_with_itself() -> None:
    """Whatever it leaves unused; unused slots elsewhere change nothing."""
    y_TD = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    turned = Routing(ONE.expert_ids_TK.flip(1), ONE.weights_TK.flip(1))
    for same in (ONE, turned):
        found = Difference.of(same, ONE, y_TD, y_TD, 4).measures()
        assert found == {
            "jaccard": 1,
            "same_experts": 1,
            "same_first_choice": 1,
            "combine_l1": 0,
            "rel_error": 0,
        }


def test_layers_add_up_by_their_tokens() -> None:
    """Sums, not means of means; and nothing is known of no tokens."""
    y_TD = torch.ones(4, 1)
    halves = [
        Difference.of(
            *(Routing(r.expert_ids_TK[some], r.weights_TK[some]) for r in (ONE, OTHER)), y_TD[some], 2 * y_TD[some], 4
        )
        for some in (slice(0, 3), slice(3, 4))
    ]
    whole = Difference.of(ONE, OTHER, y_TD, 2 * y_TD, 4).measures()
    assert (halves[0] + halves[1]).measures() == pytest.approx(whole)
    none = torch.zeros(0, 2, dtype=torch.int32)
    empty = Difference.of(*[Routing(none, none.float())] * 2, torch.zeros(0, 1), torch.zeros(0, 1), 4)
    assert empty.measures() == dict.fromkeys(WORSE)


def test_an_output_of_nothing_is_infinitely_off_or_not_at_all() -> None:
    """The reference may give zeros, as where every token was dropped."""
    nothing, something = torch.zeros(4, 1), torch.ones(4, 1)
    assert Difference.of(ONE, ONE, something, nothing, 4).measures()["rel_error"] == math.inf
    assert Difference.of(ONE, ONE, nothing, nothing, 4).measures()["rel_error"] == 0


def compared(*overrides: str, reference: str = "torch") -> tuple[Run, dict]:
    """A built run and its agreement with `router=reference`."""
    run = tiny.built(tiny.decoder_moe(*overrides, f"measure.reference_router={reference}"))
    run.verify()
    run.observe()
    return run, run.observed["agreement"]


def outputs(router: str, *overrides: str) -> Tensor:
    """Of a run with this router."""
    return tiny.built(tiny.decoder_moe(f"router={router}", *overrides)).built.step().y


def test_the_same_router_agrees_everywhere() -> None:
    """Output and routes to the last bit; the floor is what fp32 rounds."""
    _, found = compared("router=torch")
    assert found["reference"] == "torch" and found["output_rel_error"] == 0
    assert found["pooled"] == {**dict.fromkeys(("jaccard", "same_experts", "same_first_choice"), 1.0)} | dict.fromkeys(
        ("combine_l1", "rel_error"), 0.0
    )
    assert 0 < found["floor"]["output_rel_error"] < 1e-5
    assert found["floor"]["pooled"]["jaccard"] == 1


def test_the_output_error_is_that_between_runs_of_both_routers() -> None:
    """Each follows its own choices through all layers."""
    _, found = compared("router=sinkhorn")
    assert found["output_rel_error"] == pytest.approx(relative_error(outputs("sinkhorn"), outputs("torch")), rel=1e-5)
    assert found["output_rel_error"] > 100 * found["floor"]["output_rel_error"]


def test_half_of_the_experts_is_half_of_the_agreement() -> None:
    """Switch takes the first of the two that Mixtral's router takes."""
    _, found = compared("router=switch", reference="mixtral")
    assert found["pooled"]["jaccard"] == 0.5
    assert found["pooled"]["same_experts"] == 0
    assert found["pooled"]["same_first_choice"] == 1
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]


def test_layers_see_the_input_of_the_run() -> None:
    """The routes that are compared with are those of the run's own hidden states, layer by layer."""
    run, found = compared("router=sinkhorn")
    seen: list[float] = []
    reference = build.build_router(tiny.decoder_moe("router=torch"))

    def look(layer: object, arguments: tuple, result: tuple) -> None:
        theirs = reference.select(arguments[0] @ layer.weights.gate_ED.T).expert_ids_TK.tolist()  # type: ignore[attr-defined]
        mine = result[1].expert_ids_TK.tolist()
        seen.append(
            sum(len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(mine, theirs, strict=True)) / tiny.T
        )

    handles = [layer.register_forward_hook(look) for layer in moe_layers(run.built.model)]
    run.built.step()
    for handle in handles:
        handle.remove()
    assert [layer["jaccard"] for layer in found["layers"]] == pytest.approx(seen)
    assert found["pooled"]["jaccard"] == pytest.approx(sum(seen) / len(seen))
    assert found["worst"]["jaccard"] == pytest.approx(min(seen))


def test_rounding_to_bf16_stands_in_the_floor() -> None:
    """Larger than in fp32, and in the weights as well as in the output."""
    _, fp32 = compared("router=torch")
    _, bf16 = compared("router=torch", "dtype=bf16")
    assert bf16["floor"]["output_rel_error"] > 100 * fp32["floor"]["output_rel_error"]
    assert bf16["floor"]["pooled"]["combine_l1"] > 100 * fp32["floor"]["pooled"]["combine_l1"]


@pytest.mark.parametrize(
    "router", [pytest.param(name, id=name) for name in ("torch", "loss_free", "expert_choice", "soft")]
)
def test_the_run_is_left_as_it_was(router: str) -> None:
    """Parameters, routes and output; no hook and no replaced method stays, also with a router that is fitted."""
    run = tiny.built(tiny.decoder_moe(f"router={router}", f"measure.reference_router={router}"))
    before = {name: tensor.clone() for name, tensor in run.built.model.state_dict().items()}
    y = run.built.step().y.clone()
    run.verify()
    run.observe()
    assert run.observed["agreement"]["output_rel_error"] == 0
    assert torch.equal(run.built.step().y, y)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.built.model.state_dict().items())
    for layer in moe_layers(run.built.model):
        assert not vars(layer.router).keys() & {"forward", "norms_input"} and not layer._forward_hooks


def test_a_reference_that_fails_leaves_nothing_behind() -> None:
    """No hook on the run's model, no router that computes in float64."""
    run = tiny.built(tiny.decoder_moe())
    reference = tiny.built(tiny.decoder_moe("router=sinkhorn")).built.model
    for layer in moe_layers(reference):
        select = layer.router.select

        def only_narrow(logits_TE: Tensor, ctx: object, select: Any = select) -> Routing:
            return 1 / 0 if logits_TE.dtype == torch.float64 else select(logits_TE, ctx)  # type: ignore[return-value]

        layer.router.select = only_narrow  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        agreement(run.built.model, reference, run.built.x, run.built.step())
    for layer in (*moe_layers(run.built.model), *moe_layers(reference)):
        assert not vars(layer.router).keys() & {"forward", "norms_input"} and not layer._forward_hooks


def test_a_router_of_two_layers_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared by the model's layers it is switched to float64 and back once."""
    run = tiny.built(tiny.decoder_moe())
    reference = tiny.built(tiny.decoder_moe("router=sinkhorn")).built.model
    shared = moe_layers(reference)[0].router
    for layer in moe_layers(reference):
        layer.router = shared
    assert agreement(run.built.model, reference, run.built.x, run.built.step())["pooled"]["jaccard"] < 1
    assert not vars(shared).keys() & {"forward", "norms_input"}


def test_an_execution_that_fuses_is_compared_by_its_routers_choice_in_the_pass() -> None:
    """With other hidden states its own routes would differ from those of the very same router."""
    run, twin = tiny.built(tiny.decoder_moe()), tiny.built(tiny.decoder_moe()).built.model
    ran = run.built.step()
    elsewhere = ran._replace(routings=tuple(r._replace(expert_ids_TK=r.expert_ids_TK.roll(1, 0)) for r in ran.routings))
    assert agreement(run.built.model, twin, run.built.x, elsewhere)["pooled"]["jaccard"] < 1
    assert agreement(run.built.model, twin, run.built.x, elsewhere, fuses=True)["pooled"]["jaccard"] == 1


def test_a_fitted_router_of_ones_own_keeps_what_it_was_fitted_to(tmp_path: Path) -> None:
    """Also as a parameter: the reference of the same class is fitted apart, and says something else."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "fitted.yaml").write_text("_target_: fitted_router.Fitted\nname: fitted\nto: 0\n")
    (tmp_path / "fitted_router.py").write_text(
        "import torch\n"
        "from moe_lab.routers.softmax_topk import SoftmaxTopK\n"
        "class Fitted(SoftmaxTopK):\n"
        "    calibrates = True\n"
        "    def __init__(self, n_experts, top_k, to):\n"
        "        super().__init__(n_experts, top_k, impl='auto', renormalize=True, gate_bias=True)\n"
        "        self.to_expert = to\n"
        "    def fit(self, logits_TE):\n"
        "        self.bias_E.zero_()\n"
        "        self.bias_E[self.to_expert] = 50.0\n"
    )
    words = quick.overrides("decoder_moe", "router=fitted", "measure.reference_router=fitted")
    cfg = moe_lab.compose([*words, "measure.reference_router.to=3"], config_dir=tmp_path)
    run = tiny.built(cfg)
    before = run.built.step()
    run.verify()
    run.observe()
    assert run.observed["agreement"]["pooled"]["same_first_choice"] == 0
    assert torch.equal(run.built.step().y, before.y)


def test_a_reference_that_cannot_be_captured_is_looked_at_eagerly() -> None:
    """It is no part of what is timed."""
    cfg = tiny.decoder_moe("measure.reference_router=expert_choice")
    run = tiny.built(cfg)
    run.verify()
    run.cfg.execution.name = "compile"  # after the step was made
    run.observe()
    assert run.observed["agreement"]["pooled"]["jaccard"] < 1


@pytest.mark.parametrize(
    ("error", "shown"), [pytest.param(None, "- (3e-07)", id="null"), pytest.param(0.25, "2.5e-01 (3e-07)", id="known")]
)
def test_an_error_that_is_not_known_is_a_dash(
    error: float | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Infinity is null in a record that was written."""
    found = {"reference": "torch", "seconds": 1.25, "output_rel_error": error, "floor": {"output_rel_error": 3e-7}}
    print_records([tiny.record(tiny.decoder_moe(), agreement=found)])
    assert shown in capsys.readouterr().out


def test_a_forced_load_has_no_agreement() -> None:
    """It is said, not left out in silence."""
    run, found = compared("workload.load=zipf")
    assert found is None
    assert any("workload.load=zipf" in text and "no routes to compare" in text for text in run.warnings)


def test_a_model_without_routers_has_none() -> None:
    """Nothing to compare."""
    run = tiny.built(tiny.moe_layer("measure.reference_router=torch"))
    run.verify()
    run.observe()
    assert run.observed["agreement"]["pooled"]["jaccard"] == 1
    run = tiny.built(tiny.transformer_decoder())
    run.cfg.measure.reference_router = tiny.decoder_moe("router=torch").router
    run.verify()
    run.observe()
    assert run.observed["agreement"] is None


def test_a_reference_that_cannot_run_is_a_warning() -> None:
    """The run's own numbers stand."""
    run = tiny.built(tiny.moe_layer("measure.reference_router=hash"))
    run.verify()
    run.observe()
    assert "agreement" not in run.observed
    assert any("agreement was not measured" in text and "token" in text for text in run.warnings)


def test_looking_changes_no_result() -> None:
    """Whether a reference is looked at is no part of the cell's identity."""
    plain = tiny.decoder_moe("router=sinkhorn")
    assert cell_id(plain) == cell_id(tiny.decoder_moe("router=sinkhorn", "measure.reference_router=torch"))
