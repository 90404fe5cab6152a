"""listing.py: the groups, their options, and what is said about each."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.cli import listing
from tests import tiny


def shown(names: list[str], config_dir: Path | None, capsys: pytest.CaptureFixture[str]) -> list[str]:
    listing.show(names, str(config_dir) if config_dir else None)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of a person's own: a router with a comment behind Hydra's, a new group without one, a log's setting."""
    files = {
        "router/mine.yaml": "# @package _global_\n# [bold]Mine[/] in a line.\nname: mine\n",
        "tokenizer/words.yaml": "name: words\n",
        "hydra/launcher/other.yaml": "# not ours\n",
        "config.yaml": "# no option\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_option_of_the_package_is_listed_with_a_comment(capsys: pytest.CaptureFixture[str]) -> None:
    """conf/ is what is listed, group by group, and nothing in it is left unexplained."""
    lines = shown([], None, capsys)
    (folder,) = listing.folders(None)
    expected = {}
    for path in folder.rglob("*.yaml"):
        group = path.parent.relative_to(folder).as_posix()
        if group != "." and not group.startswith(("_", "analysis", "hydra")):
            expected.setdefault(group, set()).add(path.stem)
    assert {"router", "model", "model/shape", "experts", "experiment"} <= expected.keys()
    found: dict[str, set[str]] = {}
    for line in lines:
        if not line.startswith(" "):
            found[line] = set()
            group = line
        else:
            option, *about = line.split(maxsplit=1)
            found[group].add(option)
            assert about, f"{group}/{option}.yaml begins with no comment"
    assert found == expected
    assert list(found) == sorted(found)


@pytest.mark.parametrize("name", [pytest.param("router", id="group"), pytest.param("routers", id="plural")])
def test_one_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name and its options, in a column as wide as they are."""
    group, *options = shown([name], None, capsys)
    assert group == "router"
    names = [line.split()[0] for line in options]
    assert names == sorted(path.stem for path in (tiny.ROOT / "conf" / "router").glob("*.yaml"))
    assert {"cuda_ext", "sinkhorn", "torch"} < set(names)
    assert len({line.index(line.split(maxsplit=1)[1]) for line in options}) == 1


def test_a_persons_own_options_stand_with_the_packages(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their groups; a comment is shown as it is, Hydra's own is none, and what is Hydra's is no group."""
    lines = [line.split(maxsplit=1) for line in shown(["router"], own, capsys)]
    assert ["mine", "[bold]Mine[/] in a line."] in lines
    assert [line.rstrip() for line in shown(["tokenizer"], own, capsys)] == ["tokenizer", "  words"]
    assert not [group for group in listing.groups(str(own)) if group.startswith("hydra") or group == "."]


def test_several_groups_in_the_order_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """`moe-lab list models routers`."""
    lines = shown(["models", "routers"], None, capsys)
    assert [line for line in lines if not line.startswith(" ")] == ["model", "router"]


def test_a_group_that_is_not_there_is_a_mistake_with_the_nearest_name() -> None:
    """One line with all there are; nothing of the groups before it is printed."""
    with pytest.raises(ValueError, match=r"^rooter: unknown group; choose one of .*experts.*Did you mean router\?$"):
        listing.show(["model", "rooter"], None)
