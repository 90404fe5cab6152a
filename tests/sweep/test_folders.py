"""sweep/folders.py: each cell has a folder of its own below the sweep's, or nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.sweep import folders


@pytest.mark.parametrize(
    ("names", "says"),
    [
        pytest.param(["x", "x"], "two cells would have the folder", id="the-same"),
        pytest.param(["x", "./x"], "two cells would have the folder", id="the-same-written-otherwise"),
        pytest.param(["x", "y/../x"], "two cells would have the folder", id="the-same-by-dots"),
        pytest.param(["x", "link"], "is a link", id="the-same-by-a-link"),
        pytest.param(["a", "b", "A"], "two cells would have the folder", id="case"),
        pytest.param(["../x"], "is not below", id="above"),
        pytest.param(["plots/1"], "has another use", id="plots"),
        pytest.param([".lock"], "has another use", id="lock"),
        pytest.param(["plan.json"], "has another use", id="plan"),
        pytest.param(["away"], "is a link", id="a-link-elsewhere"),
        pytest.param(["."], "is not below", id="the-sweep-itself"),
        pytest.param(["/x"], "is not below", id="absolute"),
        pytest.param(["x", "x/y"], "the folder of another cell", id="one-in-another"),
        pytest.param(["x" * 256], "too long", id="long"),
        pytest.param(["\u00e4" * 128], "too long", id="long-in-bytes"),
        pytest.param(["/".join(["x" * 200] * 21)], "too long", id="long-path"),
    ],
)
def test_what_is_refused(names: list[str], says: str, tmp_path: Path) -> None:
    """One line that names the key."""
    sweep = tmp_path / "s"
    (sweep / "x").mkdir(parents=True)
    (sweep / "link").symlink_to("x")
    (sweep / "away").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"^hydra\.sweep\.subdir: .*{says}") as raised:
        folders.check(sweep, [sweep / name for name in names])
    assert len(str(raised.value).splitlines()) == 1


def test_what_is_allowed(tmp_path: Path) -> None:
    """Folders of folders, names that begin alike, the longest name."""
    folders.check(tmp_path, [tmp_path / name for name in ("x/1", "x/2", "x1", "y" * 255)])
