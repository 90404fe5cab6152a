"""records/identity.py: cell_id, code_id, env_id and the readable slug."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict

import moe_lab
from moe_lab.records import identity
from moe_lab.records.identity import cell_id, code_id, content, env_id, model_name, option_name, slug
from tests import quick, tiny

MACHINE = {
    "device_name": "NVIDIA H100",
    "driver": "570.1",
    "cuda": "13.0",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "python": "3.11.7",
    "cpu": "AMD EPYC",
    "threads": 2,
    "git_sha": "a" * 40,
    "git_dirty": False,
    "hydra": "1.3.8",
    "host_memory_mb": 1000.0,
}


CONFIG = tiny.decoder_moe()


def changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    """A copy with one value set, whether the key is there or not."""
    other = cfg.copy()
    with open_dict(other):
        OmegaConf.update(other, key, value, force_add=True)
    return other


def script(body: str) -> str:
    return f"import sys, json\nfrom moe_lab.records import identity\n{body}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("name", "my favourite", id="name"),
        pytest.param("overrides", ["batch=2", "something=else"], id="overrides"),
        pytest.param("sweep.name", "tuesday", id="sweep"),
        pytest.param("measure.max_time_s", 99.0, id="how_long"),
        pytest.param("measure.target_ci", 0.5, id="how_well"),
        pytest.param("measure.routing", False, id="what_is_looked_at"),
        pytest.param("export.dir", "/somewhere/else", id="export_dir"),
        pytest.param("experiment", "demo", id="experiment"),
        pytest.param("debug", "fast", id="debug"),
        pytest.param("hydra", {"job": {"num": 3}}, id="hydra"),
    ],
)
def test_cell_id_ignores_labels_and_how_it_is_looked_at(key: str, value: Any) -> None:
    """What changes nothing in the result is not part of who it is."""
    cfg = tiny.decoder_moe()
    assert cell_id(changed(cfg, key, value)) == cell_id(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("batch", 3, id="batch"),
        pytest.param("seq_len", 8, id="seq_len"),
        pytest.param("seed", 1, id="seed"),
        pytest.param("router.iters", 11, id="router_key"),
        pytest.param("router.temperature", 1.5, id="router_temperature"),
        pytest.param("dtype.name", "bf16", id="dtype"),
        pytest.param("device.name", "cuda", id="device"),
        pytest.param("execution.name", "compile", id="execution"),
        pytest.param("experts.name", "loop", id="experts"),
        pytest.param("model.n_experts", 6, id="model_key"),
        pytest.param("model.tie_embeddings", True, id="model_flag"),
        pytest.param("workload.phase", "prefill", id="phase"),
        pytest.param("model.attention", "math", id="attention"),
        pytest.param("export.name", "netron", id="export"),
        pytest.param("router.mine", 1, id="a_new_key"),
    ],
)
def test_cell_id_changes_with_what_is_computed(key: str, value: Any) -> None:
    """Every key that the result depends on is in it."""
    cfg = tiny.decoder_moe("router=sinkhorn")
    assert cell_id(changed(cfg, key, value)) != cell_id(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("seq_len", 999, id="seq_len"),
        pytest.param("router.name", "other", id="router"),
        pytest.param("experts._target_", "somewhere.else", id="experts"),
    ],
)
def test_cell_id_ignores_what_the_model_does_not_read(key: str, value: Any) -> None:
    """model=minimal has no sequence, router or experts: cells that differ in them are one."""
    cfg = tiny.minimal()
    assert cell_id(changed(cfg, key, value)) == cell_id(cfg)
    assert slug(changed(cfg, key, value)) == slug(cfg)
    assert cell_id(changed(cfg, "batch", 999)) != cell_id(cfg)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(["router=sinkhorn"], ["router=sinkhorn", "router.iters=10"], id="default_written_out"),
        pytest.param(["experiment=demo"], ["router=sinkhorn", "batch=2", "seq_len=128"], id="experiment_spelt_out"),
        pytest.param(["model.rope_theta=10000"], ["model.rope_theta=1e4"], id="whole_and_exponent"),
        pytest.param(["batch=3", "seed=5"], ["seed=5", "batch=3"], id="order"),
        pytest.param(["model.n_kv_heads=null"], [], id="null_written_out"),
        pytest.param(["debug=fast"], ["batch=1", "seq_len=8"], id="debug_spelt_out"),
        pytest.param(["name=a"], ["name=b", "measure.max_time_s=1"], id="labels"),
    ],
)
def test_two_spellings_of_one_cell_have_one_id(one: list[str], other: list[str]) -> None:
    """The id is of the resolved configuration, not of what was typed."""
    assert cell_id(moe_lab.compose(one)) == cell_id(moe_lab.compose(other))


def on_files(folder: Path, *more: str, text: str = "some text", weights: bytes = b"weights") -> DictConfig:
    """A checkpoint and a text in this folder; whether they can be run nobody asks."""
    for name in ("model", "texts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(weights)
    (folder / "texts" / "a.txt").write_text(text)
    paths = (f"model.path={folder}/model", "workload=text", f"workload.path={folder}/texts")
    return moe_lab.compose(quick.overrides("checkpoint", *paths, *more))


def test_files_are_told_by_what_they_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    """The same checkpoint and text at two places are one cell; another byte in either makes another."""
    one, other = on_files(tmp_path / "one"), on_files(tmp_path / "deep" / "other")
    assert cell_id(one) == cell_id(other)
    assert str(tmp_path) not in json.dumps(content(one))
    ids = {cell_id(one)}
    ids.add(cell_id(on_files(tmp_path / "text", text="some texT")))
    ids.add(cell_id(on_files(tmp_path / "weights", weights=b"weightS")))
    moved = on_files(tmp_path / "name")
    (tmp_path / "name/texts/a.txt").rename(tmp_path / "name/texts/b.txt")
    ids.add(cell_id(moved))
    assert len(ids) == 4


def test_a_path_from_here_and_from_the_root_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were typed on two days; a list of one text is that text."""
    monkeypatch.chdir(tmp_path)
    whole = on_files(tmp_path)
    for path in ("texts", "texts/", "texts/a.txt", "[texts/a.txt]"):
        here = on_files(tmp_path, "model.path=model", f"workload.path={path}")
        assert cell_id(here) == cell_id(whole)


def test_a_cell_whose_files_are_gone_still_has_an_id(tmp_path: Path) -> None:
    """By their names, so that a row can say what is missing."""
    one, other = (on_files(tmp_path, f"model.path={name}", "workload.path=gone") for name in ("x", "y"))
    assert cell_id(one) != cell_id(other)
    assert content(one)["model"]["path"] == "x" and content(one)["workload"]["path"] == "gone"


@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("forward", "prefill", "decode")])
def test_the_length_of_the_context_counts_in_decode_alone(phase: str) -> None:
    """A sweep over both has no cell twice."""
    cfg = changed(tiny.decoder_moe(), "workload.phase", phase)
    other = changed(cfg, "workload.context_len", 77)
    assert (cell_id(other) == cell_id(cfg)) == (phase != "decode")
    assert (slug(other) == slug(cfg)) == (phase != "decode")


def test_a_chunk_counts_where_a_prefill_has_several() -> None:
    """Of a prefill or of a context; one that holds all tokens is the whole, and a forward pass has none."""
    for phase, key, at_length in (("prefill", "seq_len", 7), ("decode", "workload.context_len", 9)):
        cfg = changed(changed(tiny.decoder_moe(), "workload.phase", phase), key, at_length)
        whole, cut = ([cell_id(each), slug(each)] for each in (cfg, changed(cfg, "workload.prefill_chunk", 3)))
        assert all(one != other for one, other in zip(whole, cut, strict=True)) and "c3-cpu" in cut[1]
        assert cell_id(changed(cfg, "workload.prefill_chunk", 2)) != cut[0]
        for chunk in (at_length, at_length + 1):
            same = changed(cfg, "workload.prefill_chunk", chunk)
            assert [cell_id(same), slug(same)] == whole
    forward = tiny.decoder_moe()
    assert cell_id(changed(forward, "workload.prefill_chunk", 3)) == cell_id(forward)


def test_records_and_configurations_have_the_same_identity(tmp_path: Path) -> None:
    """A record holds the resolved configuration, as plain data with its paths."""
    cfg = on_files(tmp_path, "workload.phase=decode", "workload.context_len=9")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    before = json.dumps(plain)
    assert cell_id(plain) == cell_id(cfg)
    assert json.dumps(plain) == before


def test_asking_for_an_id_leaves_the_configuration_as_it_was() -> None:
    """What the id leaves out is still there for the run."""
    cfg = tiny.minimal("export.dir=/x")
    before = cfg.copy()
    cell_id(cfg)
    slug(cfg)
    assert cfg == before


def test_id_is_stable_across_processes_and_known_without_torch() -> None:
    """Another process, another hash seed: the same 12 digits; and neither torch nor pandas is loaded for it."""
    code = script(
        "import moe_lab\n"
        "cfg = moe_lab.compose(sys.argv[1:])\n"
        "heavy = sorted({'torch', 'pandas'} & set(sys.modules))\n"
        "print(json.dumps([identity.cell_id(cfg), identity.slug(cfg), identity.code_id(), heavy]))"
    )
    overrides = ["model=decoder_moe", "router=sinkhorn", "batch=3", "device=cpu"]
    cfg = moe_lab.compose(overrides)
    mine = [cell_id(cfg), slug(cfg), code_id(), []]
    for seed in ("1", "2"):
        assert json.loads(tiny.python(code, *overrides, env={"PYTHONHASHSEED": seed})) == mine


def test_ids_are_twelve_hex_digits(tmp_path: Path) -> None:
    """They stand in names of directories."""
    for text in (cell_id(tiny.minimal()), code_id(), code_id([tmp_path]), env_id(MACHINE)):
        assert re.fullmatch("[0-9a-f]{12}", text)


def test_slug_reads_like_the_cell() -> None:
    """The words of the design's example; what the model does not read is left out."""
    assert slug(tiny.decoder_moe("router=sinkhorn")) == "decoder_moe-sinkhorn-auto-b2-s7-cpu-fp32-eager"
    assert slug(tiny.moe_layer()) == "moe_layer-E5_K2_D32_F24-torch-auto-b1-s14-cpu-fp32-eager"
    assert slug(tiny.minimal("dtype=bf16")) == "minimal-b2-cpu-bf16-eager"


SIZES = {"n_experts": 8, "top_k": 2, "d_model": 512, "mlp_hidden_dim": 2048}


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param({"name": "demo", **SIZES}, "demo", id="of_the_package"),
        pytest.param({"name": "demo", **SIZES, "n_experts": 48}, "E48-K2-D512-F2048", id="own_sizes_beside_an_option"),
        pytest.param({"name": "mine", **SIZES}, "mine-E8-K2-D512-F2048", id="of_a_persons_file"),
        pytest.param({"name": None, **SIZES}, "E8-K2-D512-F2048", id="without_a_name"),
    ],
)
def test_a_shape_is_called_by_what_it_is(shape: dict[str, Any], name: str) -> None:
    """Its option's name stays in the configuration, and the cell keeps its id, but no label says it."""
    assert identity.shape_name(shape) == name
    cfg = moe_lab.compose(["model=moe_layer", "device=cpu", *(f"model.shape.{key}={shape[key]}" for key in SIZES)])
    assert (f"moe_layer-{name.replace('-', '_')}-" in slug(cfg)) == (shape["name"] == "demo")


def test_every_shape_of_the_package_has_its_name() -> None:
    """As composed."""
    for path in (tiny.ROOT / "conf" / "model" / "shape").glob("*.yaml"):
        cfg = moe_lab.compose(["model=moe_layer", f"model/shape={path.stem}", "device=cpu"])
        assert identity.shape_name(cfg.model.shape) == path.stem


def test_slug_of_a_checkpoint_has_its_folders_name_and_the_phase(tmp_path: Path) -> None:
    """And the length of the context in decode; forward goes without saying."""
    (tmp_path / "my olmoe").symlink_to(quick.TINY_OLMOE)
    path = f"model.path={tmp_path}/my olmoe"
    end = "cpu-fp32-eager"
    for more, middle in (
        ([], "b2-s16"),
        (["workload.phase=prefill"], "b2-s16-prefill"),
        (["workload.phase=decode", "workload.context_len=77"], "b2-s16-decode77"),
    ):
        cfg = moe_lab.compose(quick.overrides("checkpoint", path, *more))
        assert slug(cfg) == f"my_olmoe-native-auto-{middle}-{end}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param("/models/OLMoE-1B-7B", "OLMoE-1B-7B", id="absolute"),
        pytest.param("../OLMoE/", "OLMoE", id="slash_at_the_end"),
        pytest.param(".", "checkpoint", id="here"),
        pytest.param("..", "checkpoint", id="above"),
        pytest.param("/", "checkpoint", id="root"),
        pytest.param(None, "checkpoint", id="none"),
    ],
)
def test_a_checkpoint_is_called_by_its_folder(path: str | None, name: str) -> None:
    """Where its path names one; other models by their option."""
    assert model_name({"_target_": "x.Y", "name": "checkpoint", "path": path}) == name
    assert model_name(tiny.minimal().model) == "minimal"


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=200))
def test_slug_is_one_safe_path_component_whatever_the_name(name: str) -> None:
    """No separator, space or shell character of a user's option reaches the file system, and the length is bounded."""
    text = slug(changed(CONFIG, "router.name", name))
    assert 0 < len(text) <= 120
    assert not re.search(r"[^\w.-]", text)
    assert Path(text).name == text and text not in (".", "..")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../etc/passwd", id="climbing"),
        pytest.param("a b;rm -rf $HOME|`x`\n", id="shell"),
        pytest.param("router" * 60, id="long"),
        pytest.param("路" * 120, id="long_in_bytes"),
    ],
)
def test_a_directory_of_slug_and_id_can_be_made(tmp_path: Path, name: str) -> None:
    """A file system allows 255 bytes, not characters."""
    cfg = changed(tiny.decoder_moe(), "router.name", name)
    folder = tmp_path / f"{slug(cfg)}-{cell_id(cfg)}"
    folder.mkdir()
    assert folder.parent == tmp_path and folder.is_dir()


def test_an_option_without_a_name_is_called_by_its_target() -> None:
    """A user's YAML may leave the name out."""
    node = {"_target_": "my_router.Mine", "name": "favourite"}
    assert option_name(OmegaConf.create(node)) == "favourite"
    del node["name"]
    assert option_name(OmegaConf.create(node)) == "Mine"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder of a user's own: a router, its configuration and a note."""
    folder = tmp_path / "mine"
    (folder / "router").mkdir(parents=True)
    (folder / "my_router.py").write_text("ANSWER = 42\n")
    (folder / "router" / "mine.yaml").write_text("_target_: my_router.Mine\n")
    (folder / "notes.txt").write_text("to do\n")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "my_router.py").write_text("ANSWER = 43\n"), id="edited"),
        pytest.param(lambda folder: (folder / "my_router.py").rename(folder / "renamed.py"), id="renamed"),
        pytest.param(lambda folder: (folder / "more.py").write_text(""), id="added_empty"),
        pytest.param(lambda folder: (folder / "router" / "deep.py").write_text("x = 1"), id="added_below"),
        pytest.param(lambda folder: (folder / "kernel.cu").write_text("// cuda"), id="cuda_source"),
        pytest.param(lambda folder: (folder / "my_router.py").unlink(), id="removed"),
    ],
)
def test_code_id_changes_with_a_plugins_sources(plugin: Path, change: Callable[[Path], Any]) -> None:
    """A result made with other source bytes is stale."""
    before = code_id([plugin])
    change(plugin)
    assert code_id([plugin]) != before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "notes.txt").write_text("done\n"), id="note"),
        pytest.param(lambda folder: (folder / "README.md").write_text("# hello"), id="readme"),
        pytest.param(lambda folder: (folder / "router" / "mine.yaml").write_text("_target_: x.Y\n"), id="yaml"),
        pytest.param(lambda folder: (folder / "my_router.py").touch(), id="touched"),
    ],
)
def test_code_id_does_not_change_with_what_is_not_executed(plugin: Path, change: Callable[[Path], Any]) -> None:
    """A note beside the sources, or a new time stamp (a YAML stands in the cell_id)."""
    before = code_id([plugin])
    change(plugin)
    assert code_id([plugin]) == before


def test_code_id_does_not_depend_on_where_a_plugin_lies(plugin: Path, tmp_path: Path) -> None:
    """The same sources on another machine are the same code."""
    before = code_id([plugin])
    assert code_id([plugin.rename(tmp_path / "elsewhere")]) == before
    assert code_id() != before


def test_code_id_survives_an_editors_lock_file(plugin: Path) -> None:
    """Emacs marks a file being edited by a symbolic link to nowhere, `.#my_router.py`."""
    (plugin / ".#my_router.py").symlink_to("someone@somewhere.1234")
    assert re.fullmatch("[0-9a-f]{12}", code_id([plugin]))


def test_bytes_do_not_wander_between_files_unseen(tmp_path: Path) -> None:
    """The end of one file and the start of the next are told apart."""
    folders = []
    for name, first, second in (("one", "ab", "c"), ("other", "a", "bc")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.py").write_text(first)
        (folder / "b.py").write_text(second)
        folders.append(folder)
    assert code_id([folders[0]]) != code_id([folders[1]])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("threads", 3, id="threads"),
        pytest.param("torch", "2.14.0", id="torch"),
        pytest.param("triton", None, id="triton"),
        pytest.param("cuda", "13.1", id="cuda"),
        pytest.param("driver", "575.0", id="driver"),
        pytest.param("device_name", "NVIDIA H200", id="device"),
        pytest.param("cpu", "Intel Xeon", id="cpu"),
        pytest.param("python", "3.12.7", id="python_minor"),
    ],
)
def test_env_id_changes_with_the_machine_and_its_versions(key: str, value: Any) -> None:
    """Each field of the design's list."""
    assert env_id({**MACHINE, key: value}) != env_id(MACHINE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("git_sha", "b" * 40, id="git_sha"),
        pytest.param("git_dirty", True, id="git_dirty"),
        pytest.param("python", "3.11.9", id="python_patch"),
        pytest.param("hydra", "1.4.0", id="hydra"),
        pytest.param("host_memory_mb", 2000.0, id="memory"),
    ],
)
def test_env_id_does_not_change_with_the_commit(key: str, value: Any) -> None:
    """A commit that changes no executed byte makes no result stale."""
    assert env_id({**MACHINE, key: value}) == env_id(MACHINE)


def test_what_auto_means_on_a_gpu_counts() -> None:
    """A result made by another choice is stale; of a CPU, where there is none, the id is as it was."""
    for field, names in {"router_auto": ("cuda_ext", "triton", "torch"), "experts_auto": ("fused", "grouped")}.items():
        assert env_id({**MACHINE, field: None}) == env_id(MACHINE)
        assert len({env_id({**MACHINE, field: choice}) for choice in (None, *names)}) == 1 + len(names)


def test_the_state_of_the_caches_counts() -> None:
    ids = {cell_id(changed(CONFIG, "measure.cache", cache)) for cache in ("natural", "cold", "hot")}
    assert len(ids) == 3
    assert cell_id(CONFIG) in ids  # natural, as records were before there was a choice


CELL_IDS = {
    "decode": "bc487f131c21",
    "demo": "7b1b46ea1ca6",
    "gate_kernels": "59e465fe766a",
    "expert_kernels": "d08afa44f30a",
    "fitted_load": "076eceb7d39f",
    "layer_load": "15c3385ca5de",
    "quality_speed": "aef74754cffa",
    "mock_vs_text": "aef74754cffa",
    "router_comparison": "4bfc0cbb9078",
    "router_kernels": "9c578d0ee72d",
    "router_swap": "aef74754cffa",
    "prune": "3c7415804e4f",
    "quantize": "3c7415804e4f",
    "routing_quality": "4bfc0cbb9078",
    "search_router": "d34d3ba716cd",
    "sinkhorn_kernels": "b97993aa6512",
    "speculation": "9148daa56c3d",
}
"""Of each experiment's first cell on a CPU. Results are found and joined by these ids.

If one changes here, all results that people have are no longer found. A new key or group must not do that: name it with
its default in `_LATER` of records/identity.py. If a default itself changes, the id has to change: write it down here,
and say so in CHANGELOG.md.
"""


@pytest.mark.parametrize("experiment", [pytest.param(name, id=name) for name in CELL_IDS])
def test_cells_keep_their_ids(experiment: str) -> None:
    """On every machine and in every folder: the paths name what is not there, so their names count."""
    on_files = (
        "decode", "fitted_load", "mock_vs_text", "prune", "quality_speed", "quantize", "router_swap", "search_router",
        "speculation",
    )  # fmt: skip
    paths = ["model.path=no-model", "workload.path=no-text"] if experiment in on_files else []
    assert cell_id(moe_lab.compose([f"experiment={experiment}", "device=cpu", *paths])) == CELL_IDS[experiment]


def test_every_experiment_has_a_cell_whose_id_is_known() -> None:
    assert CELL_IDS.keys() == {path.stem for path in (tiny.ROOT / "conf" / "experiment").glob("*.yaml")}


LATER = [
    pytest.param("seq_parts", 1, 2, id="key"),
    pytest.param("model.shape.n_new", 0, 3, id="key-in-a-group"),
    pytest.param("router.inner.noise", None, 0.1, id="key-of-an-inner-router"),
    pytest.param("quantization", {"name": "none", "bits": None}, {"name": "int8", "bits": 8}, id="group"),
]


@pytest.mark.parametrize(("key", "default", "other"), LATER)
def test_what_comes_later_leaves_the_ids_of_before(
    key: str, default: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its default; at another value it is another cell. A configuration and a record's are not changed by asking."""
    before = moe_lab.compose(["model=moe_layer", "router=capacity"])
    monkeypatch.setitem(identity._LATER, key, default)
    at_default, elsewhere = changed(before, key, default), changed(before, key, other)
    assert cell_id(at_default) == cell_id(before) != cell_id(elsewhere)
    record: Any = OmegaConf.to_container(at_default, resolve=True)
    unchanged = json.dumps(record)
    assert cell_id(record) == cell_id(before)
    assert json.dumps(record) == unchanged


def test_a_key_that_comes_later_in_a_group_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is compared without the key."""
    before = moe_lab.compose([])
    monkeypatch.setitem(identity._LATER, "quantization", {"name": "none"})
    monkeypatch.setitem(identity._LATER, "quantization.bits", 4)
    assert cell_id(changed(before, "quantization", {"name": "none", "bits": 4})) == cell_id(before)
    assert cell_id(changed(before, "quantization", {"name": "none", "bits": 8})) != cell_id(before)


def test_a_key_that_nobody_named_changes_the_id() -> None:
    """So `_LATER` is what keeps it, and a key that is forgotten there is seen by the table of ids."""
    before = moe_lab.compose([])
    assert cell_id(changed(before, "quantization", {"name": "none"})) != cell_id(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "key", "other"),
    [
        *[
            pytest.param(router, "renormalize", False, id=f"renormalize-{router}")
            for router in ("sinkhorn", "top_p", "min_p", "expert_skip", "oea", "xshare", "quantile")
        ],
        pytest.param("deepseek_v4", "hash_layers", 1, id="hash_layers"),
        pytest.param("xshare", "keeps_best", False, id="keeps_best"),
        pytest.param("xshare", "window", 4, id="window"),
    ],
)
def test_a_key_came_later_to_some_routers(router: str, key: str, other: Any) -> None:
    """Its default changes no cell_id, inside another router neither; another value does."""
    for words in ([f"router={router}"], ["router=capacity", f"router@router.inner={router}"]):
        ids = []
        for change in ("pop", "keep", "set"):
            plain: Any = OmegaConf.to_container(tiny.decoder_moe(*words), resolve=True)
            node = plain["router"].get("inner") or plain["router"]
            if change == "pop":
                del node[key]
            elif change == "set":
                node[key] = other
            ids.append(identity.digest(content(plain)))
        assert ids[0] == ids[1] != ids[2]
    assert "renormalize" in content(tiny.decoder_moe("router=mixtral"))["router"]  # which had it from the start
