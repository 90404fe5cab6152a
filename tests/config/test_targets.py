"""targets.py: whom a `_target_` may name. Where a check would leave modules behind, it runs in a fresh interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import moe_lab
from moe_lab.config import targets
from moe_lab.config.mistakes import explain
from moe_lab.config.targets import instantiate, locate
from moe_lab.experts.weights import swiglu
from moe_lab.routers.base import RouteContext, Routing
from moe_lab.routers.softmax_topk import SoftmaxTopK
from tests import quick, tiny

MARKING = """
from pathlib import Path
Path({mark!r}).write_text("imported")
def call(*arguments, **options):
    return "called"
class Thing:
    def __init__(self, **options):
        self.options = options
"""
TRY = """
import sys
from omegaconf import OmegaConf
from moe_lab.config import targets

folder, *contents = sys.argv[1:]
if folder:
    targets.trust(folder)
for content in contents:
    try:
        found = targets.instantiate(OmegaConf.create(content))
        print("found", found)
    except ValueError as error:
        print("refused", error)
"""
WIDEN = """
import sys
from omegaconf import OmegaConf
from moe_lab.config import targets

for content in ({"_target_": "moe_lab.config.targets.trust", "config_dir": sys.argv[1]}, {"_target_": "evil.call"}):
    try:
        targets.instantiate(OmegaConf.create(content))
    except ValueError:
        pass
print(tuple(targets._trusted))
"""
ROUTER = """
from moe_lab.routers.base import NO_CONTEXT
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Mine(SoftmaxTopK):
    def __init__(self, n_experts, top_k, strength=1.0):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        self.strength = strength

    def select(self, logits_TE, ctx=NO_CONTEXT):
        return super().select(logits_TE * self.strength, ctx)
"""
PLUGIN = """
import sys
import torch
import moe_lab

cfg = moe_lab.compose(["model=moe_layer", "router=mine", "router.strength=2.5"], config_dir=sys.argv[1])
router = moe_lab.build_router(cfg)
routing = router.select(torch.tensor([[0.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]]))
print(type(router).__module__, router.strength, routing.expert_ids_TK.tolist())
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that appears when a module under test is imported."""
    return tmp_path / "imported"


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    """The folder that the person gives as --config-dir."""
    folder = tmp_path / "mine"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nobody gave."""
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def write(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MARKING.format(mark=str(mark)))
    return path


def attempt(content: str, folder: Path | str = "", path: Path | str = "") -> str:
    """What happens to the YAML `content` with `folder` trusted and `path` on PYTHONPATH."""
    return tiny.python(TRY, folder, content, env={"PYTHONPATH": str(path)}).strip()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        pytest.param("moe_lab.experts.weights.swiglu", swiglu, id="function"),
        pytest.param("moe_lab.routers.softmax_topk.SoftmaxTopK", SoftmaxTopK, id="class"),
        pytest.param("moe_lab.routers.base.Routing", Routing, id="tuple"),
    ],
)
def test_what_is_in_the_package_may_be_named(target: str, found: object) -> None:
    """The very object that an import gives."""
    assert locate(target) is found


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("os.system", id="os"),
        pytest.param("builtins.eval", id="eval"),
        pytest.param("subprocess.Popen", id="subprocess"),
        pytest.param("torch.load", id="torch"),
        pytest.param("moe_lab", id="the_package_itself"),
        pytest.param("moe_lab_evil.run", id="a_name_that_begins_alike"),
        pytest.param("eval", id="no_module"),
        pytest.param("", id="empty"),
        pytest.param(".moe_lab.errors", id="relative"),
        pytest.param("moe_lab.cli.os.system", id="through_an_import_of_ours"),
        pytest.param("moe_lab.experts.grouped.segment_mm", id="what_a_module_only_imports"),
        pytest.param("moe_lab.records.store.write_atomic", id="what_no_option_is_made_of"),
        pytest.param("moe_lab.config.targets.importlib.import_module", id="through_another"),
        pytest.param("../outside/evil.call", id="a_path"),
    ],
)
def test_everything_else_is_refused(target: str) -> None:
    """Also what our own modules happen to import."""
    with pytest.raises(ValueError, match="_target_"):
        locate(target)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("moe_lab.routers.no_such_module.thing", id="module"),
        pytest.param("moe_lab.experts.loop.NoSuch", id="attribute"),
    ],
)
def test_a_name_that_is_not_there_is_a_mistake_that_names_it(target: str) -> None:
    """One line, not a traceback of an import."""
    with pytest.raises(ValueError, match=target.replace(".", r"\.")):
        locate(target)


def test_keys_become_arguments() -> None:
    """Without the target and the name."""
    node = OmegaConf.create({"_target_": "moe_lab.routers.base.Routing", "name": "label", "expert_ids_TK": "route"})
    made = instantiate(node, weights_TK="planted")
    assert isinstance(made, Routing)
    assert made[:2] == ("route", "planted")


def test_objects_are_passed_as_they_are() -> None:
    """An argument may be anything, a function too."""
    node = OmegaConf.create({"_target_": "moe_lab.routers.base.Routing", "expert_ids_TK": "route"})
    assert instantiate(node, weights_TK=swiglu).weights_TK is swiglu


def test_a_key_that_is_no_argument_is_a_mistake_that_names_the_target() -> None:
    """A misspelt key of a user's own YAML has no schema to catch it."""
    node = OmegaConf.create({"_target_": "moe_lab.routers.base.Routing", "expert_id_TK": "route", "weights_TK": "x"})
    with pytest.raises(
        ValueError, match=r"^router\.expert_id_TK: .*moe_lab\.routers\.base\.Routing takes expert_ids_TK"
    ):
        instantiate(node, "router")


class Base:
    def __init__(self, *, width: int, depth: int = 1):
        self.width, self.depth = width, depth


class PassesOn(Base):
    def __init__(self, *, height: int = 1, **keys: int):
        super().__init__(**keys)
        self.height = height


class TakesAny:
    def __init__(self, first: int, **keys: int):
        self.first, self.keys = first, keys


def by_place(first: int, /, second: int = 2, *, third: int = 3) -> tuple[int, int, int]:
    return first, second, third


def two_by_place(first: int, second: int, /) -> tuple[int, int]:
    return first, second


def misnames(*, size: int) -> int:
    return len(size=size)  # type: ignore[call-arg]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of these targets, trusted."""
    monkeypatch.setattr(targets, "_check_trusted", lambda *_: None)
    monkeypatch.setattr(targets, "_is_defined_in_trust", lambda module: True)
    return __name__


@pytest.mark.parametrize(
    ("target", "keys", "given", "message"),
    [
        pytest.param("Base", {"width": 1, "dept": 2}, {}, r"g\.dept: .*Base takes width, depth\. .*depth\?", id="typo"),
        pytest.param("Base", {"depth": 2}, {}, r"g\.width: missing; .*Base requires it", id="missing"),
        pytest.param("Base", {"self": 2, "width": 1}, {}, r"g\.self: unknown", id="self"),
        pytest.param("Base", {"width": 1}, {"width": 2}, r"g\.width: unknown key; .* takes depth\.", id="given"),
        pytest.param("PassesOn", {"width": 1, "tile": 2}, {}, r"g\.tile: .*takes height, width, depth\.", id="base"),
        pytest.param("TakesAny", {"first": 1}, {"first": 2}, r"g\.first: unknown", id="any-but-what-is-given"),
        pytest.param("two_by_place", {"first": 1, "second": 2}, {}, r"g\.first: unknown", id="place-only"),
        pytest.param("two_by_place", {}, {}, r"g\.first: .*by name", id="place-only-required"),
        pytest.param("Base", {"width": {"_target_": "Base", "wide": 1}}, {}, r"g\.width\.wide: .*takes w", id="nested"),
        pytest.param("Base", {"width": {"_target_": "Base"}}, {}, r"g\.width\.width: missing", id="nested-missing"),
        pytest.param(
            "Base", {"width": [{"_target_": "Base", "_partial_": True, "x": 1}]}, {}, r"g\.width\[0\]\.x", id="list"
        ),
        pytest.param("Base", {"width": 1, "_args_": [1]}, {}, r"g\._args_: unknown", id="hydras-own"),
    ],
)  # fmt: skip
def test_a_key_that_a_target_does_not_take_is_refused_in_one_line(
    target: str, keys: dict[str, Any], given: dict[str, Any], message: str, here: str
) -> None:
    """It names the key and what the target takes."""

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        if isinstance(value, dict):
            return {k: f"{here}.{v}" if k == "_target_" else named(v) for k, v in value.items()}
        return value

    node = OmegaConf.create(named({"_target_": target, "name": "label", **keys}))
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        instantiate(node, "g", **given)
    assert "\n" not in str(raised.value)


def test_keys_arrive(here: str) -> None:
    """By name, passed on to a base, in `**keys`, and of a nested node; a default where none is given."""

    def make(name: str, **keys: Any) -> Any:
        return instantiate(OmegaConf.create({"_target_": f"{here}.{name}", **keys}), "g")

    made = make("PassesOn", width=3, height=4)
    assert (made.width, made.depth, made.height) == (3, 1, 4)
    made = make("TakesAny", first=1, tile=128)
    assert (made.first, made.keys) == (1, {"tile": 128})
    nested = {"_target_": f"{here}.by_place", "_args_": [7], "third": 9}
    assert make("Base", width=nested).width == (7, 2, 9)
    partial = {"_target_": f"{here}.Base", "_partial_": True, "depth": 5}
    assert make("Base", width=partial).width(width=6).depth == 5


def test_a_type_error_inside_of_a_target_is_not_taken_for_a_mistake(here: str) -> None:
    """It is a defect of that code, and its traceback says where."""
    with pytest.raises(TypeError, match="len"):
        instantiate(OmegaConf.create({"_target_": f"{here}.misnames", "size": 3}), "g")


def test_an_option_without_a_target_names_its_place() -> None:
    """One line."""
    with pytest.raises(ValueError, match=r"^router\._target_ has no value"):
        instantiate(OmegaConf.create({"name": "x"}), "router")


def test_nested_nodes_are_made_too() -> None:
    """A node within a node, and within a list."""
    inner = {"_target_": "moe_lab.routers.base.RouteContext", "_args_": ["inner"]}
    node = OmegaConf.create(
        {"_target_": "moe_lab.routers.base.Routing", "expert_ids_TK": inner, "weights_TK": [inner, 3]}
    )
    made = instantiate(node)
    assert made.expert_ids_TK == RouteContext("inner")
    assert made.weights_TK == [RouteContext("inner"), 3]


def test_a_module_on_the_path_but_outside_is_refused_and_not_imported(outside: Path, trusted: Path, mark: Path) -> None:
    """Being importable is not being trusted."""
    write(outside / "evil.py", mark)
    for folder in ("", trusted):
        assert attempt("{_target_: evil.call}", folder, outside).startswith("refused")
    assert not mark.exists()


NESTED = {
    "expert_ids_TK: {_target_: evil.call}": "evil",
    "expert_ids_TK: [1, [{_target_: evil.call}]]": "evil",
    "expert_ids_TK: {deep: {deeper: {_target_: evil.call}}}": "evil",
    "a: {_target_: '${b}'}, b: evil.call": "evil",
    "expert_ids_TK: {_target_: os.getcwd, _partial_: true}": "os",
}


def test_a_nested_target_is_refused_before_anything_is_called(outside: Path, mark: Path) -> None:
    """However deep it stands, through an interpolation, and where nothing would be called yet."""
    write(outside / "evil.py", mark)
    contents = [f"{{_target_: moe_lab.routers.base.Routing, {arguments}}}" for arguments in NESTED]
    said = tiny.python(TRY, "", *contents, env={"PYTHONPATH": str(outside)}).splitlines()
    for arguments, words in zip(NESTED, said, strict=True):
        assert words.startswith(f"refused _target_={NESTED[arguments]}"), arguments
    assert not mark.exists()


def test_no_configuration_widens_whom_to_trust(outside: Path, mark: Path) -> None:
    """Only --config-dir and config_dir= do; `trust` lies in the package, yet may not be named."""
    write(outside / "evil.py", mark)
    assert tiny.python(WIDEN, outside).strip() == "()"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("files", "target"),
    [
        pytest.param(["plugin.py"], "plugin.Thing", id="module"),
        pytest.param(["pkg/__init__.py"], "pkg.Thing", id="package"),
        pytest.param(["pkg/__init__.py", "pkg/deep.py"], "pkg.deep.Thing", id="module_of_a_package"),
    ],
)
def test_a_module_in_the_trusted_folder_may_be_named(
    files: list[str], target: str, trusted: Path, outside: Path, mark: Path
) -> None:
    """It is found there, whatever the working directory or the path hold."""
    for file in files:
        write(trusted / file, mark)
    said = attempt(f"{{_target_: {target}, size: 3}}", trusted, outside)
    assert said.startswith("found <") and mark.exists()
    mark.unlink()
    assert attempt(f"{{_target_: {target}, size: 3}}").startswith("refused")
    assert not mark.exists()


def test_the_trusted_folders_module_wins_over_one_of_the_same_name(trusted: Path, outside: Path, mark: Path) -> None:
    """The file that was checked is the file that runs."""
    write(outside / "plugin.py", mark)
    (trusted / "plugin.py").write_text("def call():\n    return 'the right one'\n")
    assert attempt("{_target_: plugin.call}", trusted, outside) == "found the right one"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("links", "target"),
    [
        pytest.param([("plugin.py", "evil.py")], "plugin.call", id="module"),
        pytest.param([("pkg", "pkg")], "pkg.call", id="package"),
        pytest.param([("pkg", "pkg")], "pkg.deep.call", id="module_of_a_package"),
    ],
)
def test_a_link_that_leads_out_of_the_trusted_folder_is_refused(
    links: list[tuple[str, str]], target: str, trusted: Path, outside: Path, mark: Path
) -> None:
    """A name in the folder is not a file in the folder."""
    for file in ("evil.py", "pkg/__init__.py", "pkg/deep.py"):
        write(outside / file, mark)
    for name, leads_to in links:
        (trusted / name).symlink_to(outside / leads_to)
    assert attempt(f"{{_target_: {target}}}", trusted).startswith("refused")
    assert not mark.exists()


def test_a_link_inside_a_trusted_package_that_leads_out_is_refused(trusted: Path, outside: Path, mark: Path) -> None:
    """Every file on the way to the object lies in the folder, not only the first."""
    write(outside / "evil.py", mark)
    (trusted / "pkg").mkdir()
    (trusted / "pkg" / "__init__.py").write_text("")
    (trusted / "pkg" / "deep.py").symlink_to(outside / "evil.py")
    assert attempt("{_target_: pkg.deep.call}", trusted).startswith("refused")
    assert not mark.exists()


def test_a_linked_package_beside_a_module_of_its_name_is_refused(trusted: Path, outside: Path, mark: Path) -> None:
    """Python prefers the package, so it is the package that has to be looked at."""
    write(outside / "pkg" / "__init__.py", mark)
    (trusted / "plugin.py").write_text("def call():\n    return 'the module'\n")
    (trusted / "plugin").symlink_to(outside / "pkg")
    attempt("{_target_: plugin.call}", trusted)
    assert not mark.exists()


def test_a_folder_that_is_itself_a_link_may_be_trusted(trusted: Path, tmp_path: Path, mark: Path) -> None:
    """The person gave it; what it leads to is the folder."""
    write(trusted / "plugin.py", mark)
    (tmp_path / "link").symlink_to(trusted)
    assert attempt("{_target_: plugin.call}", tmp_path / "link") == "found called"


@pytest.mark.parametrize("module", [pytest.param(name, id=name) for name in ("re", "omegaconf", "sys")])
def test_a_name_that_is_loaded_from_elsewhere_is_refused(module: str, trusted: Path, mark: Path) -> None:
    """The module that Python would give is not the file in the folder."""
    write(trusted / f"{module}.py", mark)
    said = attempt(f"{{_target_: {module}.call}}", trusted)
    assert said.startswith("refused") and "rename" in said
    assert not mark.exists()


def test_a_users_folder_plugs_in_a_router(trusted: Path) -> None:
    """A class and a YAML in the person's own folder; the package is not edited."""
    (trusted / "my_router.py").write_text(ROUTER)
    (trusted / "router").mkdir()
    (trusted / "router" / "mine.yaml").write_text("_target_: my_router.Mine\nname: mine\nstrength: 1.0\n")
    assert tiny.python(PLUGIN, trusted).split(maxsplit=2) == ["my_router", "2.5", "[[2, 3]]\n"]


def test_a_folder_that_is_not_there_cannot_be_trusted(tmp_path: Path) -> None:
    """The message names it, and nothing is added."""
    before = list(sys.path)
    with pytest.raises(ValueError, match="nowhere"):
        targets.trust(tmp_path / "nowhere")
    assert sys.path == before


def test_trusting_twice_adds_once(trusted: Path) -> None:
    """Order and number of the folders are part of code_id."""
    code = """
import os, sys
from moe_lab.config import targets
before, path = len(sys.meta_path), list(sys.path)
os.chdir(sys.argv[1])
first, second = targets.trust("."), targets.trust(sys.argv[1])
print(first == second, len(tuple(targets._trusted)), len(sys.meta_path) - before, sys.path == path)
"""
    assert tiny.python(code, trusted).split() == ["True", "1", "1", "True"]


SHADOW = """
import sys
from omegaconf import OmegaConf
from moe_lab.config import targets

targets.trust(sys.argv[1])
import csv, colorsys, sqlite3, yaml
print([module.__file__.startswith(sys.argv[1]) for module in (csv, colorsys, sqlite3, yaml)])
print(targets.instantiate(OmegaConf.create({"_target_": "plugin.call"})))
"""


def test_a_module_beside_a_plugin_replaces_no_library(trusted: Path, mark: Path) -> None:
    """Those of Python and those installed; the plug-in's own modules are found."""
    for name in ("csv", "colorsys", "sqlite3", "yaml"):
        write(trusted / f"{name}.py", mark)
    (trusted / "helper.py").write_text("def word():\n    return 'helped'\n")
    (trusted / "plugin.py").write_text("import helper\ndef call():\n    return helper.word()\n")
    assert tiny.python(SHADOW, trusted).split("\n")[:2] == ["[False, False, False, False]", "helped"]
    assert not mark.exists()


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("colorsys", "numpy", "torch", "yaml")])
def test_a_plugin_with_the_name_of_a_library_is_refused(name: str, trusted: Path, mark: Path) -> None:
    """Loaded or not yet: the line says to rename it."""
    write(trusted / f"{name}.py", mark)
    said = attempt(f"{{_target_: {name}.call}}", trusted)
    assert said.startswith("refused") and "rename yours" in said
    assert not mark.exists()


IMPORTING = """
import subprocess
from os import system
from subprocess import run, Popen
from functools import partial
from moe_lab.routers.softmax_topk import SoftmaxTopK
shell = partial(system)
number = 3
def mine():
    return "mine"
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("system", id="system"),
        *(pytest.param(n, id=n, marks=pytest.mark.slow) for n in ("shell", "run", "Popen", "number")),
    ],
)
def test_what_a_plugin_only_imports_may_not_be_named(name: str, trusted: Path) -> None:
    """The object says where it was defined; what the plug-in passes on of ours is fine."""
    (trusted / "plugin.py").write_text(IMPORTING)
    code = "import sys\nfrom moe_lab.config import targets\ntargets.trust(sys.argv[1])\n"
    code += "for target in sys.argv[2:]:\n    try:\n        print(targets.locate(target))\n"
    code += "    except ValueError as error:\n        print('refused', error)\n"
    said = tiny.python(code, trusted, f"plugin.{name}", "plugin.subprocess.run", "plugin.mine", "plugin.SoftmaxTopK")
    words = [line.split()[0] for line in said.splitlines()]
    assert words == ["refused", "refused", "<function", "<class"]


_FAULTS = {
    "at-import": ("x = 1\n1 / 0\n", "error: ZeroDivisionError: division by zero (placed_{}.py:2)"),
    "syntax": ("x = 1\n\ndef f(:\n", "error: SyntaxError: invalid syntax (placed_{}.py:3)"),
    "select": (
        "from moe_lab.routers.base import Router\n"
        "class Own(Router):\n"
        "    def select(self, logits_TE, ctx=None):\n"
        "        return self.deeper(logits_TE)\n"
        "    def deeper(self, logits_TE):\n"
        "        raise RuntimeError('planted')\n",
        "error: RuntimeError: planted (placed_{}.py:6)",
    ),
    "within-torch": (
        "import torch\nfrom moe_lab.routers.base import Router\n"
        "class Own(Router):\n"
        "    def select(self, logits_TE, ctx=None):\n"
        "        return torch.nn.functional.linear(logits_TE, logits_TE[:, 1:])\n",
        "(placed_{}.py:5)",
    ),
}
_MISTAKES = {
    "missing-module": ("\nimport nothing_like_it\n", "router._target_={}: No module named 'nothing_like_it'", 2),
    "init": (
        "from moe_lab.routers.base import Router\n"
        "class Own(Router):\n"
        "    def __init__(self, n_experts, top_k):\n"
        "        raise ValueError('planted.')\n",
        "planted",
        4,
    ),
}


def _own(folder: Path, name: str, code: str) -> DictConfig:
    module = f"placed_{name.replace('-', '_')}"
    (folder / "router").mkdir()
    (folder / "router" / "own.yaml").write_text(f"_target_: {module}.Own\nname: own\n")
    (folder / f"{module}.py").write_text(code)
    words = quick.overrides("moe_layer", "router=own")
    return moe_lab.compose(words, config_dir=folder)


@pytest.mark.parametrize(("name", "code", "reason"), [pytest.param(n, *rest, id=n) for n, rest in _FAULTS.items()])
def test_a_failed_record_names_the_deepest_line_of_the_plug_in(
    name: str, code: str, reason: str, tmp_path: Path
) -> None:
    """Not a line of torch's or of ours that it called."""
    record = moe_lab.run(_own(tmp_path, name, code), tmp_path / "run")
    assert record.status == "failed" and record.reason is not None
    assert record.reason.endswith(reason.format(name.replace("-", "_"))), record.reason


@pytest.mark.parametrize(("name", "code", "text", "line"), [pytest.param(n, *r, id=n) for n, r in _MISTAKES.items()])
def test_a_mistake_of_a_plug_in_names_its_line(name: str, code: str, text: str, line: int, tmp_path: Path) -> None:
    """And says how to see the traceback."""
    module = f"placed_{name.replace('-', '_')}"
    with pytest.raises(ValueError, match=r"planted|No module") as caught:
        moe_lab.run(_own(tmp_path, name, code), tmp_path / "run")
    whole = explain(caught.value)
    assert whole == f"{text.format(f'{module}.Own')}; HYDRA_FULL_ERROR=1 shows the traceback ({module}.py:{line})"


def test_an_error_of_ours_names_no_line() -> None:
    """There is no plug-in in it."""
    with pytest.raises(ValueError, match="not trusted") as caught:
        targets.locate("nowhere.Own")
    assert targets.place_of(caught.value) == "" and "HYDRA_FULL_ERROR" not in explain(caught.value)
