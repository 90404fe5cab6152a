"""`import moe_lab`: the names that it offers, whatever was imported before."""

from __future__ import annotations

import pydoc
import rlcompleter

import pytest

import moe_lab
from tests import tiny

ROOMS = sorted(path.name for path in (tiny.ROOT / "moe_lab").iterdir() if (path / "__init__.py").is_file())


def test_dir_and_completion_offer_the_functions() -> None:
    """And nothing of the machinery behind them."""
    assert set(moe_lab.__all__) <= set(dir(moe_lab))
    assert {name for name in dir(moe_lab) if not name.startswith("__")} == set(moe_lab.__all__)
    completer = rlcompleter.Completer({"moe_lab": moe_lab})
    offered = [completer.complete("moe_lab.", state) for state in range(40)]
    found = {str(text).removeprefix("moe_lab.").rstrip("()") for text in offered if text}
    assert set(moe_lab.__all__) <= found


def test_help_describes_each() -> None:
    """With its first line."""
    text = pydoc.render_doc(moe_lab, renderer=pydoc.plaintext)
    for name in moe_lab.__all__:
        assert f"{name}(" in text
    assert "Run every combination of the values" in text and "docs/python.md" in text


def test_every_name_is_a_function_with_its_types() -> None:
    """`TYPE_CHECKING` has the same names, for editors."""
    source = (tiny.ROOT / "moe_lab" / "__init__.py").read_text()
    assert moe_lab.__all__ == sorted(moe_lab._HOME)
    for name in moe_lab.__all__:
        function = getattr(moe_lab, name)
        assert callable(function) and function.__doc__ and function.__name__ == name
        assert f"from {moe_lab._HOME[name]} import {name} as {name}\n" in source
    with pytest.raises(AttributeError, match="nothing"):
        moe_lab.nothing  # noqa: B018


def test_no_function_carries_the_name_of_a_room() -> None:
    """Importing `moe_lab.results` would put the room in the function's place."""
    assert not set(moe_lab.__all__) & {*ROOMS, "errors", "intervals", "marks", "terminal", "conf", "kernels"}


@pytest.mark.slow
def test_the_functions_stay_when_every_module_was_imported() -> None:
    """And in a fresh process `import moe_lab` loads neither torch nor pandas."""
    code = (
        "import sys, pkgutil, importlib, moe_lab\n"
        "assert not {'torch', 'pandas', 'rich', 'hydra'} & set(sys.modules)\n"
        "for found in pkgutil.walk_packages(moe_lab.__path__, 'moe_lab.'):\n"
        "    if not found.name.endswith(('_onnx', '__main__')) and '.export' not in found.name:\n"
        "        try:\n"
        "            importlib.import_module(found.name)\n"
        "        except ModuleNotFoundError as lacking:\n"
        "            assert lacking.name in ('optuna', 'ray', 'submitit'), lacking\n"  # extras
        "print(all(callable(getattr(moe_lab, name)) for name in moe_lab.__all__))\n"
        "print(len(moe_lab.list_routers()), moe_lab.compose(['batch=3']).batch)"
    )
    *_, answers, last = tiny.python(code).splitlines()
    assert answers == "True" and last.split()[1] == "3"
