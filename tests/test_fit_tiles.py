"""benchmarks/fit_tiles.py: the model of the tiles against timings, here of a GPU that is made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import fit_tiles
from benchmarks.fit_tiles import cells_of, fit, loss, regret
from benchmarks.tune_experts import kept
from moe_lab.experts.table import Shape
from moe_lab.experts.tiles import Gpu, Tiles, gpu_of, predicted_s

H200 = gpu_of("NVIDIA H200", 132)
OTHER = H200._replace(flop_s=0.5 * H200.flop_s, l2_bytes_s=3 * H200.l2_bytes_s, store_up_s=8e-6, store_down_s=8e-6)
"""On which tiles of few rows are better than the model thinks."""
SHAPES = {"olmoe": Shape(64, 8, 2048, 1024), "qwen3": Shape(128, 8, 2048, 768), "mixtral": Shape(8, 2, 4096, 14336)}


def timings(truth: Gpu, tokens: tuple[int, ...] = (64, 4096)) -> pd.DataFrame:
    """As `tune_experts` writes them, if `truth` is the GPU."""
    rows = []
    for name, shape in SHAPES.items():
        for T in tokens:
            ups, downs = kept(H200, shape, T, 6, 2.0)

            def us(tiles: Tiles, shape: Shape = shape, T: int = T) -> float:
                return 1e6 * predicted_s(truth, shape, T, tiles) + 5

            first = [Tiles(*up, *downs[0]) for up in ups]
            best = min(first, key=us)[:2]
            sizes = {"shape": name, "dtype": "bf16", **shape._asdict(), "T": T, "device": "NVIDIA H200"}
            rows.append({**sizes, "implementation": "grouped", "us": 1e5})
            for tiles in [*first, *(Tiles(*best, *down) for down in downs)]:
                of_model = tiles == (*ups[0], *downs[0])
                rows.append(
                    {**sizes, "implementation": "fused", **tiles._asdict(), "us": us(tiles), "of_model": of_model}
                )
    return pd.DataFrame(rows)


def test_times_of_both_products_add_up() -> None:
    """Of every choice, also of those that nobody timed together."""
    for cell in cells_of(timings(OTHER)):
        assert len(cell.choices()) == len(cell.ups) * len(cell.downs) > len(cell.ups) + len(cell.downs) - 1
        for tiles in cell.choices():
            assert cell.us(tiles) == pytest.approx(1e6 * predicted_s(OTHER, cell.shape, cell.T, tiles) + 5)


def test_the_true_model_regrets_nothing_and_a_wrong_one_is_fitted() -> None:
    """To smaller losses, and choices as good as those of the truth."""
    cells = cells_of(timings(OTHER))
    assert [regret(OTHER, cell) for cell in cells] == pytest.approx([0] * len(cells), abs=1e-6)
    assert max(regret(H200, cell) for cell in cells) > 0.1
    fitted = fit(H200, cells)
    assert loss(fitted, cells) < 0.5 * loss(H200, cells)
    assert max(regret(fitted, cell) for cell in cells) < 0.03
    assert fitted.multiprocessors == H200.multiprocessors and fit(H200, []) == H200


@pytest.mark.parametrize(
    ("truth", "code"), [pytest.param(H200, 0, id="as-thought"), pytest.param(OTHER, 1, id="another")]
)
def test_the_exit_code_tells_whether_the_model_is_good_enough(
    truth: Gpu, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the file; each shape has a row for each T, and is left out once."""
    timings(truth, (64,) if code == 0 else (4096,)).to_csv(tmp_path / "x.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["fit_tiles", str(tmp_path / "x.csv")])
    assert fit_tiles.main() == code
    text = capsys.readouterr().out
    assert all(f"{name} bf16" in text for name in SHAPES) and "left out: " in text and "store_up_s: 1e-06 -> " in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(None, "file not found; python -m benchmarks.tune_experts writes one", id="missing"),
        pytest.param(
            "shape,tokens,ms\ndemo,1,0.02\n", "not the timings of python -m benchmarks.tune_experts", id="other"
        ),
    ],
)
def test_another_file_is_refused_in_one_line(
    text: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["fit_tiles", str(path)])
    with pytest.raises(SystemExit, match="2"):
        fit_tiles.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {path}: {reason}")
