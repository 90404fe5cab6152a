"""docs/python.md: every block runs, one after the other, in a process of its own and in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_lab
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_has_every_function() -> None:
    """Each is called in a block; the README links to the page."""
    called = set(re.findall(r"moe_lab\.(\w+)\(", "\n".join(BLOCKS)))
    assert called == set(moe_lab.__all__)
    assert "(docs/python.md)" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    """As a script without `if __name__`; the assertions in it hold."""
    (tmp_path / "page.py").write_text("\n".join(BLOCKS))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bacth: unknown key" in done.stdout or "Did you mean batch?" in done.stdout
    assert (tmp_path / "outputs" / "first" / "report.html").is_file()
