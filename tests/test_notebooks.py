"""examples/notebooks: each is executed as a person would do it, in a kernel of its own; none has outputs.

So the bar of a sweep (api/notebook.py) is tested where it is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip install '.[notebook]')")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (pip install '.[notebook]')")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (pip install '.[notebook]')")

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_outputs_are_stripped(path: Path) -> None:
    """They would be out of date, and of one machine; the file is in nbformat's own writing."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """first_look.ipynb after all of its cells, in an empty folder."""
    notebook = nbformat.read(FOLDER / "first_look.ipynb", as_version=4)
    where = tmp_path_factory.mktemp("notebook")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(where)}}).execute()
    return notebook


def shown(notebook: Any, source: str, mime: str) -> list[str]:
    """What the cell with this text displays in this format."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    return [output.data[mime] for output in cell.outputs if mime in output.get("data", {})]


@pytest.mark.slow
def test_first_look_shows_what_it_says(executed: Any) -> None:
    """A record, a bar that is full, a table of the sweep with a row per cell, pandas, a figure with real text."""
    (record,) = shown(executed, "result = moe_lab.run(cfg)", "text/html")
    assert record.startswith("<table>") and re.search(r">ok(, unstable)?<", record)
    bar, table = shown(executed, "sweep = moe_lab.multirun", "text/html")
    assert re.match(r'<progress value="6" max="6"></progress> <code>6/6 ', bar)
    assert table.count("<tr>") == 7 and "ratio [interval]" in table
    (text,) = [text for text in shown(executed, "sweep = moe_lab.multirun", "text/plain") if "variant" in text]
    assert len(re.findall(r"^(?:torch|sinkhorn) ", text, re.MULTILINE)) == 6  # what a notebook without HTML shows
    (frame,) = shown(executed, "runs = moe_lab.load", "text/html")
    assert "ratio_to_anchor.p50" in frame
    (figure,) = shown(executed, "plots.xy(", "image/svg+xml")
    assert "<text" in figure and "batch (sequences)" in figure
    (mine,) = shown(executed, "class Equal", "text/html")[1:]
    assert "equal" in mine and "failed" not in mine
    assert shown(executed, "router.select", "text/plain")[0].startswith("tensor([[0.5000, 0.5000]")


@pytest.mark.slow
def test_first_look_prints_nothing_to_worry_about(executed: Any) -> None:
    """A mistake is one line; on standard error only what the sweep says of itself."""
    texts = [output for cell in executed.cells for output in cell.get("outputs", ()) if output.output_type == "stream"]
    out = "".join(output.text for output in texts if output.name == "stdout")
    assert re.fullmatch(r"router=sinkhron: .*Did you mean sinkhorn\?\n", out), out
    err = "".join(output.text for output in texts if output.name == "stderr")
    lines = [line for line in err.splitlines() if line]
    assert [line for line in lines if not re.match(r"outputs/|(/.*)?outputs", line)] == [], err
