"""config/compose.py: the command line's language in Python.

Its types are in config/schemas.py and config/router_options.py, the checks that types cannot express in
config/checks.py, what is done to Hydra in config/hydra_patches.py, and the explanations in config/mistakes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_lab
from moe_lab.records import identity
from tests import tiny

MISTAKES = [
    pytest.param(["batch=abc"], "batch=abc", "must be a whole number", id="wrong-type"),
    pytest.param(["batch=0"], "batch=0", ">= 1", id="zero-batch"),
    pytest.param(["seed=-1"], "seed=-1", ">= 0", id="negative-seed"),
    pytest.param([f"seed={2**63}"], f"seed={2**63}", "2^63", id="wide-seed"),
    pytest.param([f"sweep.max_cells={2**64}"], f"sweep.max_cells={2**64}", "2^63", id="wide-inside"),
    pytest.param(["sweep.compare=[]"], "sweep.compare=[]", "a group at least", id="nothing-compared"),
    pytest.param(["model=router", "workload.load=zipf"], "workload.load=zipf", "model.sort=true", id="nothing-runs"),
    pytest.param(["model.n_heads=7"], "model.n_heads=7", "model.d_model=512", id="heads-do-not-divide"),
    pytest.param(["model.head_dim=31"], "model.head_dim=31", "even", id="odd-head"),
    pytest.param(["model.n_kv_heads=3"], "model.n_kv_heads=3", "model.n_heads=8", id="kv-heads-do-not-divide"),
    pytest.param(["model.top_k=9"], "model.top_k=9", "must be <= 8", id="more-slots-than-experts"),
    pytest.param(["model.top_k=[1,2]"], "model.top_k=[1, 2]", "6 layers with experts", id="too-few-ks"),
    pytest.param(["model.top_k=[2,2,2,2,2,9]"], "model.top_k", "must be <= 8", id="one-k-too-large"),
    pytest.param(["model.top_k=[2,2,0,2,2,2]"], "model.top_k", "integer >= 1", id="a-k-of-0"),
    pytest.param(["model.top_k=[]"], "model.top_k", "integer >= 1", id="no-k"),
    pytest.param(["model.top_k=null"], "model.top_k", "integer >= 1", id="k-null"),
    pytest.param(["model.top_k=two"], "model.top_k=two", "integer >= 1", id="k-in-words"),
    pytest.param(["model.top_k=[2,1,2,1,2,1]", "router=switch"], "router.top_k=1", "remove one", id="two-ks"),
    pytest.param(["model.top_k=[2,1,2,1,2,1]", "router=soft"], "router=soft", "remove one", id="soft-has-all"),
    pytest.param(
        ["model.top_k=[2,1,2,1,2,1]", "router=capacity", "router.inner.top_k=1"],
        "router.inner.top_k=1",
        "remove one",
        id="two-ks-inside",
    ),
    pytest.param(["model=moe_layer", "model.shape.top_k=9"], "model.shape.top_k=9", "n_experts=8", id="shape-top-k"),
    pytest.param(["model.n_dense_layers=7"], "model.n_dense_layers=7", "model.n_layers=6", id="too-many-dense"),
    pytest.param(["model.shared_expert_gate=true"], "shared_expert_gate", "hidden_dim", id="gate-without-expert"),
    pytest.param(["model.qk_norm=heads"], "model.qk_norm=heads", "Did you mean head?", id="misspelt-choice"),
    pytest.param(["model.d_modl=64"], "model.d_modl", "Did you mean d_model?", id="misspelt-key"),
    pytest.param(["batchh=1"], "batchh", "Did you mean batch?", id="misspelt-top-key"),
    pytest.param(["router.name=mine"], "router.name=mine", "choose another option", id="label"),
    pytest.param(["model.ignores=[router]"], "model.ignores", "choose another option", id="ignores"),
    pytest.param(["~router"], "~router", "choose router=OPTION", id="no-router"),
    pytest.param(["execution.name=graph"], "execution.name=graph", "cuda_graph", id="unknown-execution"),
    pytest.param(
        ["+hydra.callbacks.e={_target_: shutil.copy, src: a, dst: b}"], "shutil.copy", "--config-dir", id="callback"
    ),
    pytest.param(["+hydra.job_logging.filters.x.class=evil.Filter"], "evil.Filter", "logging", id="log-factory"),
    pytest.param(
        ["debug={e: {_target_: shutil.copy, src: a, dst: b}}", "+hydra.callbacks.e=${debug.e}"],
        "shutil.copy",
        "--config-dir",
        id="callback-behind-an-interpolation",
    ),
    pytest.param(["+hydra.job_logging.filters.x=${dtype.name}"], "filters.x=fp32", "a mapping", id="log-interpolation"),
    *(
        pytest.param([f"name={value}"], f"name={value}: cannot be read", f"'name=\"{value}\"'", id=case)
        for case, value in (
            ("equals-in-a-path", "/data/run=3/model"),
            ("brackets-in-a-path", "/data/models[v2]"),
            ("parentheses-in-a-path", "/data/model (copy)"),
            ("comma-at-the-end", "1,"),
            ("two-equals", "=2"),
            ("open-bracket", "[a.txt,b.txt"),
        )
    ),
    pytest.param(["name='it's'"], "name='it's': cannot be read", "in quotes that the shell leaves.", id="own-quotes"),
    pytest.param(["+foo=1"], "foo", "unknown key", id="added-key"),
    pytest.param(["router=sinkhron"], "router=sinkhron", "Did you mean sinkhorn?", id="misspelt-option"),
    pytest.param(["measure.reference_router=sinkhron"], "=sinkhron", "Did you mean sinkhorn?", id="misspelt-reference"),
    pytest.param(
        ["measure={reference_router: torch}"], "measure.reference_router=torch", "defaults", id="reference-text"
    ),
    pytest.param(
        ["measure.reference_router=sinkhorn", "measure.reference_router.iters=0"],
        "measure.reference_router.iters=0",
        ">= 1",
        id="reference-without-iterations",
    ),
    pytest.param(
        ["measure.reference_router=sinkhorn", "measure.reference_router.name=mine"],
        "measure.reference_router.name=mine",
        "choose another option",
        id="reference-label",
    ),
    pytest.param(
        ["router=capacity", "router.inner.name=mine"], "router.inner.name=mine", "choose another", id="inner-label"
    ),
    pytest.param(["ruter=torch"], "ruter", "Did you mean router?", id="misspelt-group"),
    pytest.param(["router=sinkhorn", "router.iters=0"], "router.iters=0", ">= 1", id="no-iterations"),
    pytest.param(["router=sinkhorn", "router.temperature=0"], "router.temperature", "> 0", id="zero-temperature"),
    pytest.param(["router.impl=triton"], "router.impl=triton", "always uses torch", id="fixed-impl"),
    pytest.param(["router=sinkhorn", "router.impl=fast"], "router.impl=fast", "auto, torch", id="unknown-impl"),
    pytest.param(
        ["workload.phase=generate"], "workload.phase=generate", "forward, prefill, decode", id="unknown-phase"
    ),
    pytest.param(["workload.phase=decod"], "workload.phase=decod", "Did you mean decode?", id="misspelt-phase"),
    pytest.param(
        ["workload.context_len=5"],
        "workload.context_len=5",
        "only used with workload.phase=decode",
        id="unread-context",
    ),
    pytest.param(
        ["workload.phase=prefill", "workload.context_len=5"],
        "context_len=5",
        "only used with workload.phase=decode",
        id="context-in-prefill",
    ),
    pytest.param(
        ["workload.phase=decode", "workload.context_len=0"], "workload.context_len=0", ">= 1", id="no-context"
    ),
    pytest.param(
        ["workload.phase=prefill", "workload.prefill_chunk=0"], "workload.prefill_chunk=0", ">= 1", id="no-chunk"
    ),
    pytest.param(["model.attention=flsh"], "model.attention=flsh", "Did you mean flash?", id="misspelt-attention"),
    pytest.param(
        ["workload.window=2"], "workload.window=2", "only used with workload.phase=decode", id="unread-window"
    ),
    pytest.param(["workload.phase=decode", "workload.window=0"], "workload.window=0", ">= 1", id="no-window"),
    pytest.param(
        ["workload.phase=decode", "workload.window=3", "seq_len=8"],
        "workload.window=3: must divide seq_len=8",
        "choose another seq_len",
        id="window-that-does-not-divide",
    ),
    pytest.param(["workload=text"], "workload.path", "set workload.path=", id="no-text"),
    pytest.param(["workload=text", "workload.path=7"], "workload.path=7", "a file, a folder", id="number-for-a-path"),
    pytest.param(
        ["workload=text", "workload.path=[]"], "workload.path=[]", "a list of files and folders", id="no-paths"
    ),
    pytest.param(["workload=text", "workload.path=[a,3]"], "workload.path=['a', 3]", "a list", id="number-in-paths"),
    pytest.param(["workload=text", "workload.path=''"], "workload.path=", "a file, a folder", id="empty-path"),
    pytest.param(["workload.path=a"], "workload.path", "workload=text has it", id="path-without-text"),
    pytest.param(["model=checkpoint"], "model.path", "set model.path=", id="no-checkpoint"),
    pytest.param(
        ["model=checkpoint", "model.path=d", "model.d_model=8"],
        "model.d_model",
        "model=checkpoint has no such key",
        id="size-of-its-own",
    ),
    pytest.param(
        ["model=checkpoint", "model.path=d", "model.implementation=fast"], "implementation=fast", "auto", id="norm-impl"
    ),
    pytest.param(["measure.quality_tokens=0"], "measure.quality_tokens=0", ">= 1", id="no-quality-tokens"),
    pytest.param(["model=minimal", "seq_len=4"], "seq_len=4", "does not use", id="unread-seq-len"),
    pytest.param(["model=minimal", "router=sinkhorn"], "router=sinkhorn", "does not use", id="unread-router"),
    pytest.param(
        ["model=transformer_decoder", "router.renormalize=false"],
        "router.renormalize",
        "does not use",
        id="unread-key",
    ),
    pytest.param(["measure.target_ci=nan"], "measure.target_ci=nan", "> 0", id="nan"),
    pytest.param(["measure.max_time_s=0"], "measure.max_time_s", "> 0", id="no-time"),
    pytest.param(["batch=1,2"], "batch=1,2", "call moe_lab.multirun", id="sweep-without-m"),
    pytest.param(["report"], "report", "KEY=VALUE", id="not-an-override"),
]


@pytest.mark.parametrize(("overrides", "names", "mends"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key_and_the_mend(overrides: list[str], names: str, mends: str) -> None:
    """ValueError; the message holds the key with its value and what to do instead."""
    with pytest.raises(ValueError) as raised:
        moe_lab.compose(overrides)
    message = str(raised.value)
    assert names in message
    assert mends in message
    assert "\n" not in message


def test_compose_speaks_the_command_lines_language() -> None:
    """Groups, values, nested keys, and what was typed is kept."""
    overrides = ["model=moe_layer", "model/shape=olmoe_1b_7b", "router=sinkhorn", "router.iters=3", "batch=4"]
    cfg = moe_lab.compose(overrides)
    assert (cfg.model.shape.n_experts, cfg.model.shape.top_k) == (64, 8)
    assert (cfg.router.iters, cfg.batch, cfg.seq_len) == (3, 4, 128)
    assert list(cfg.overrides) == overrides


def test_an_experiment_sets_what_it_names_and_the_command_line_wins() -> None:
    """experiment=demo chooses sinkhorn; router=torch beside it is stronger."""
    assert moe_lab.compose(["experiment=demo"]).router.name == "sinkhorn"
    assert moe_lab.compose(["experiment=demo", "router=torch"]).router.name == "torch"
    assert moe_lab.compose(["experiment=demo", "batch=5"]).batch == 5


def test_a_group_of_the_users_own_is_found_and_trusted(tmp_path: Path) -> None:
    """config_dir adds an option whose class lies beside it; its keys are the class's arguments."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "last_k.yaml").write_text("_target_: last_k_router.LastK\nname: last_k\nshift: 1\n")
    (tmp_path / "last_k_router.py").write_text(
        "import torch\n"
        "from moe_lab.routers.base import Router, Routing\n"
        "class LastK(Router):\n"
        "    def __init__(self, n_experts, top_k, shift):\n"
        "        super().__init__(n_experts, top_k)\n"
        "        self.shift = shift\n"
        "    def select(self, logits_TE, ctx=None):\n"
        "        T, K = logits_TE.shape[0], self.top_k\n"
        "        ids_K = torch.arange(self.n_experts - K - self.shift, self.n_experts - self.shift)\n"
        "        scores_TE = torch.zeros(T, self.n_experts)\n"
        "        scores_TE[:, ids_K] = 1\n"
        "        ids_TK = ids_K.int().expand(T, K).contiguous()\n"
        "        return Routing(ids_TK, torch.full((T, K), 1 / K), scores_TE=scores_TE)\n"
    )
    from tests import quick

    cfg = moe_lab.compose(quick.overrides("moe_layer", "router=last_k", "router.shift=2"), config_dir=tmp_path)
    router = moe_lab.build_router(cfg)
    import torch

    assert router.select(torch.zeros(3, 5)).expert_ids_TK.tolist() == [[1, 2]] * 3
    record = moe_lab.run(cfg, tmp_path / "out")
    assert (record.status, record.reason) == ("ok", None)
    assert record.routing is not None
    assert record.routing["pooled"]["dead_experts"] == 3


def test_files_of_ones_own_are_read_anew(tmp_path: Path) -> None:
    """Edited between two compositions, as in a notebook; changes to what was composed stay there."""
    (tmp_path / "router").mkdir()
    option = tmp_path / "router" / "mine.yaml"
    for width in (3, 5):
        option.write_text(f"_target_: moe_lab.routers.softmax_topk.SoftmaxTopK\nname: mine\nwidth: {width}\n")
        cfg = moe_lab.compose(["router=mine"], config_dir=tmp_path)
        assert (cfg.router.width, cfg.measure.reference_router) == (width, None)
        cfg.measure.reference_router = "changed"
        del cfg.router.width


def test_build_router_needs_sizes_where_the_model_has_no_experts() -> None:
    """ValueError without them, a router with them."""
    cfg = moe_lab.compose(["model=minimal"])
    with pytest.raises(ValueError, match="n_experts"):
        moe_lab.build_router(cfg)
    assert moe_lab.build_router(cfg, n_experts=6, top_k=2).n_experts == 6


def test_a_reference_router_is_a_router_of_its_own() -> None:
    """With the option's keys, which can be set; the run's own router stays."""
    cfg = moe_lab.compose(
        ["router=torch", "measure.reference_router=sinkhorn", "measure.reference_router.iters=3"],
    )
    assert (cfg.router.name, cfg.measure.reference_router.name, cfg.measure.reference_router.iters) == (
        "torch",
        "sinkhorn",
        3,
    )
    assert moe_lab.compose([]).measure.reference_router is None
    assert moe_lab.compose(["measure.reference_router=null"]).measure.reference_router is None


def test_a_reference_router_of_ones_own_is_found(tmp_path: Path) -> None:
    """In the folder given, as any other option."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("_target_: moe_lab.routers.softmax_topk.SoftmaxTopK\nname: mine\n")
    cfg = moe_lab.compose(["measure.reference_router=mine"], config_dir=tmp_path)
    assert cfg.measure.reference_router.name == "mine"


def test_a_reference_router_as_plain_text_says_how_it_is_chosen(tmp_path: Path) -> None:
    """In an experiment's YAML it is an option of a group, chosen in its defaults list."""
    (tmp_path / "experiment").mkdir()
    head = "# @package _global_\n"
    (tmp_path / "experiment" / "text.yaml").write_text(f"{head}measure: {{reference_router: torch}}\n")
    (tmp_path / "experiment" / "group.yaml").write_text(
        f"{head}defaults:\n  - override /router@measure.reference_router: torch\n"
    )
    with pytest.raises(ValueError, match=r"override /router@measure\.reference_router: torch"):
        moe_lab.compose(["experiment=text"], config_dir=tmp_path)
    cfg = moe_lab.compose(["experiment=group"], config_dir=tmp_path)
    assert cfg.measure.reference_router.name == "torch"
    cfg = moe_lab.compose(["experiment=group", "measure.reference_router=null"], config_dir=tmp_path)
    assert cfg.measure.reference_router is None


def test_the_experiments_find_the_packages_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the working folder by a relative path, which a record can show to anybody; elsewhere by an absolute one."""
    monkeypatch.chdir(tiny.ROOT)
    for name in ("router_swap", "decode"):
        cfg = moe_lab.compose([f"experiment={name}"])
        assert (cfg.model.path, cfg.workload.path) == ("assets/tiny-olmoe", "assets/text")
    here = identity.cell_id(cfg)
    monkeypatch.chdir(tmp_path)
    cfg = moe_lab.compose(["experiment=decode"])
    assert Path(cfg.model.path) == tiny.ROOT / "assets" / "tiny-olmoe" and Path(cfg.workload.path).is_dir()
    assert identity.cell_id(cfg) == here
