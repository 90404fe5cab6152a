"""own_files.py: what somebody else could have put in a cache is not executed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension
from moe_lab.ops.own_files import make_own_folder, require_own

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file as it should be, three folders down."""
    path = tmp_path / "cache" / "moe-lab" / "key" / "cpu.so"
    make_own_folder(path.parent)
    path.write_bytes(b"not a library")
    path.chmod(0o700)
    return path


def link(file: Path, mode: int) -> None:
    """The binary is a link to one in another folder."""
    other = file.parents[3] / "other"
    other.mkdir()
    other.chmod(mode)
    file.rename(other / "x.so")
    file.symlink_to(other / "x.so")


PLANTED: dict[str, Callable[[Path], object]] = {
    "others_write_the_file": lambda file: file.chmod(0o777),
    "the_group_writes_the_file": lambda file: file.chmod(0o770),
    "others_write_the_folder": lambda file: file.parent.chmod(0o777),
    "the_group_writes_the_folder": lambda file: file.parent.chmod(0o770),
    "others_write_far_above": lambda file: file.parents[2].chmod(0o707),
    "a_link_into_a_folder_that_others_write": lambda file: link(file, 0o777),
}
GIVEN_AWAY: dict[str, Callable[[Path], object]] = {
    "the_file_of_another": lambda file: os.chown(file, 12345, -1),
    "the_folder_of_another": lambda file: os.chown(file.parent, 12345, -1),
    "far_above_of_another": lambda file: os.chown(file.parents[2], 12345, -1),
    "a_shared_folder_of_another": lambda file: (os.chown(file.parent, 12345, -1), file.parent.chmod(0o1777)),
}


@pytest.mark.parametrize(
    "plant",
    [
        *(pytest.param(plant, id=name) for name, plant in PLANTED.items()),
        *(pytest.param(plant, id=name, marks=as_root) for name, plant in GIVEN_AWAY.items()),
    ],
)
def test_what_others_can_change_is_refused_in_one_line(plant: Callable[[Path], object], file: Path) -> None:
    """The line names the place and what to do."""
    require_own(file)
    plant(file)
    with pytest.raises(UnavailableError, match=r"chmod go-w /|XDG_CACHE_HOME") as raised:
        require_own(file)
    assert "\n" not in str(raised.value) and str(file.parents[3]) in str(raised.value)


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda file: file.chmod(0o755), id="others_read"),
        pytest.param(lambda file: file.parents[2].chmod(0o1777), id="like_tmp"),
        pytest.param(lambda file: link(file, 0o700), id="own_link"),
        pytest.param(lambda file: file.unlink(), id="nothing_yet"),
    ],
)
def test_what_is_ones_own_is_fine(plant: Callable[[Path], object], file: Path) -> None:
    """The system's folders are root's."""
    plant(file)
    require_own(file)


def test_folders_are_for_this_user_alone(tmp_path: Path) -> None:
    """Whatever the umask; those that were there stay as they are."""
    before = os.umask(0)
    try:
        make_own_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    make_own_folder(tmp_path / "a" / "b")


def test_a_binary_that_others_can_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither looked for, nor built beside, nor loaded."""
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(extension, "find_cxx", lambda: "/bin/true")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    path = extension.binary(())
    make_own_folder(path.parent)
    path.write_bytes(b"")
    path.chmod(0o666)
    assert "chmod go-w" in str(extension.why_unavailable(torch.device("cpu")))
    for act in (extension._load.__wrapped__, lambda: extension.build(())):
        with pytest.raises(UnavailableError, match="chmod go-w"):
            act()
