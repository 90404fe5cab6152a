"""cli/table.py: records on the terminal, by setting, with the anchor first."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lab.cli import table
from moe_lab.cli.table import print_records, print_sweep
from moe_lab.records.schema import Ratio, Record
from tests import tiny
from tests.results import observed
from tests.results.compared import record, tiny_config

ROUTERS = ["native", "expert_choice", "deepseek_v3"]


def config(router: str, **values: Any) -> dict[str, Any]:
    return {"router": {**copy.deepcopy(tiny_config()["router"]), "name": router}, **values}


def cell(router: str, p50: float = 20.0, more: float | None = 0.7, **values: Any) -> Record:
    """A cell with everything that a table shows."""
    made = record(p50, config=config(router, **values))
    assert made.latency_ms is not None
    made.latency_ms.ci95_low, made.latency_ms.ci95_high = p50 * 0.98, p50 * 1.02
    made.throughput = {"tokens_per_s": 48091.0}
    made.routing = {"pooled": {"load_max_over_mean": 1.29}}
    if more is not None:
        ends = {"delta_bits_per_byte_ci95_low": more - 0.06, "delta_bits_per_byte_ci95_high": more + 0.06}
        made.quality = {"bits_per_byte": 1.472 + more, "delta_bits_per_byte": more, **ends, "kl_to_native": 1.17}
    return made


def sweep(*batches: int, anchor: str = "native") -> list[Record]:
    """The three routers at each batch, timed beside the anchor."""
    cells = [cell(router, batch=batch) for batch in batches for router in ROUTERS]
    anchors = {one.config["batch"]: one.cell_id for one in cells if one.config["router"]["name"] == anchor}
    for one in cells:
        if one.config["router"]["name"] != anchor:
            beside = anchors[one.config["batch"]]
            one.ratio_to_anchor = Ratio(anchor=beside, p50=1.39, ci95_low=1.35, ci95_high=1.42, rounds=9)
    return cells


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Standard output is a terminal of this width."""

    def be(width: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        for name in ("TERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)

    return be


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]


def test_rows_are_sorted_by_setting_with_the_anchor_first(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes as numbers, whatever the order of the command; the other variants stay in that order."""
    print_sweep(sweep(16, 2, 128, anchor="expert_choice"), ["router"])
    rows = [line.split()[:2] for line in printed(capsys)[1:10]]
    order = ["expert_choice", "native", "deepseek_v3"]
    assert rows == [[router, batch] for batch in ("2", "16", "128") for router in order]


def test_without_ratios_the_anchor_is_what_the_plan_names(capsys: pytest.CaptureFixture[str]) -> None:
    """sweep.interleave=false, or cells that failed."""
    cells = [cell(router, batch=batch) for batch in (8, 1) for router in ROUTERS]
    print_sweep(cells, ["router"], {"router": "deepseek_v3"})
    rows = [line.split()[:2] for line in printed(capsys)[1:7]]
    assert rows == [[router, batch] for batch in ("1", "8") for router in ("deepseek_v3", "native", "expert_choice")]


def test_everything_that_differs_between_settings_is_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    """Also what has no column of its own elsewhere, such as the seed; the rest is said once."""
    cells = [cell("native", seed=seed, dtype={"name": dtype}) for dtype in ("fp32", "bf16") for seed in (10, 9)]
    print_sweep(cells, ["router"])
    lines = printed(capsys)
    assert lines[0].split()[:5] == ["variant", "dtype", "batch", "seq_len", "seed"]
    found = [(line.split()[1], line.split()[4]) for line in lines[1:5]]
    assert found == [("bf16", "9"), ("bf16", "10"), ("fp32", "9"), ("fp32", "10")]
    shared = next(line for line in lines if line.startswith("every row: "))
    assert "model=moe_layer/E5-K2-D32-F24," in shared and "device=cpu" in shared and "dtype" not in shared


@pytest.mark.parametrize(
    ("width", "headings", "left_out"),
    [
        pytest.param(
            80, ["p50 [interval]", "ratio [interval]", "bits/byte vs"], ["bits/byte", "tokens/s", "status"], id="80"
        ),
        pytest.param(
            120, ["ratio [interval]", "bits/byte vs native", "tokens/s", "status"], ["KL to native", "error"], id="120"
        ),
    ],
)
def test_quality_stands_beside_the_latency_on_a_narrow_terminal(
    width: int,
    headings: list[str],
    left_out: list[str],
    on_a_terminal: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two axes, names of 13 letters: the names are folded, and what is not shown is named with where it is."""
    on_a_terminal(width)
    print_sweep(sweep(1, 8), ["router"])
    lines = printed(capsys)
    text = "\n".join(lines[:3])
    assert all(heading in text for heading in headings)
    assert all(len(line) <= width for line in lines[:9])
    row = next(line for line in lines if line.startswith("native"))
    assert "20 ms [19.6, 20.4]" in row and "+0.70 [0.64, 0.76]" in row
    text = " ".join(lines)
    named = re.search(rf"not shown at {width} columns: (.*); moe-lab report has them", text)
    assert named and set(left_out) <= set(named[1].split(", "))


def test_a_pipe_has_no_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per row with every column, whatever COLUMNS says."""
    monkeypatch.setenv("COLUMNS", "80")
    print_sweep(sweep(1, 8), ["router"])
    lines = printed(capsys)
    assert lines[0].split("  ")[0].startswith("variant") and lines[0].endswith("status")
    assert all(len(line) > 120 for line in lines[:7]) and "not shown" not in "\n".join(lines)


def test_a_terminal_that_can_nothing(
    on_a_terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TERM=dumb: no codes."""
    on_a_terminal(80)
    monkeypatch.setenv("TERM", "dumb")
    print_sweep(sweep(1, 8), ["router"])
    assert "\x1b" not in capsys.readouterr().out


def test_a_row_without_a_latency_says_why(
    on_a_terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of the latency, so that a narrow terminal has it too; the cause is below the table."""
    on_a_terminal(80)
    cells = [*sweep(1, 8), record(config=config("hash", batch=1), status="failed", reason="out_of_memory")]
    cells.append(record(config=config("cuda_ext", batch=1), status="skipped", reason="unavailable: no compiler"))
    cells[-2].directory = "outputs/s/hash"
    print_sweep(cells, ["router"])
    lines = printed(capsys)
    assert next(line for line in lines if line.startswith("hash")).split()[2] == "failed"
    assert next(line for line in lines if line.startswith("cuda_ext")).split()[2] == "skipped"
    assert "failed: out_of_memory (outputs/s/hash/run.log)" in lines
    assert "skipped (1 cell): unavailable: no compiler" in lines


def test_a_failed_row_with_a_latency_always_has_its_status(
    on_a_terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that differs: the latency stands, the run failed."""
    on_a_terminal(80)
    cells = sweep(1, 8)
    cells[0].status, cells[0].reason = "failed", "mismatch: export"
    print_sweep(cells, ["router"])
    assert next(line for line in printed(capsys) if line.startswith("native")).endswith("failed")


def test_a_record_without_a_configuration_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """It failed before it was composed; it is called by its folder, and stands last."""
    lost = tiny.record(status="failed", reason="?", directory="outputs/s/lost")
    print_sweep([lost, *sweep(1)], ["router"])
    assert [line.split()[0] for line in printed(capsys)[1:5]] == [*ROUTERS, "lost"]


def test_a_shape_of_own_sizes_is_called_by_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Not by the option beside which they were set."""
    shapes = [{**tiny_config()["model"], "shape": {**tiny_config()["model"]["shape"], "top_k": k}} for k in (4, 3)]
    print_sweep([cell("torch", model=shape) for shape in shapes], ["router"])
    assert [line.split()[1] for line in printed(capsys)[1:3]] == [f"moe_layer/E5-K{k}-D32-F24" for k in (3, 4)]


def test_single_runs_have_their_reason_below(capsys: pytest.CaptureFixture[str]) -> None:
    """A row each, in their order; then what is wrong and where the record lies."""
    failed = record(config=config("hash"), status="failed", reason="out_of_memory")
    failed.directory = "outputs/runs/hash"
    print_records([cell("torch"), failed])
    lines = printed(capsys)
    assert [line.split()[0] for line in lines[:3]] == ["router", "torch", "hash"]
    assert lines[3:] == ["failed: out_of_memory", "outputs/runs/hash/result.json"]


POSITIVE = st.floats(1e-6, 1e6)
MAYBE = st.none() | st.floats(-10, 10)


def test_energy_and_the_longest_kernels_of_a_single_run_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A column, and below the row three kernels and the command of Nsight Compute; neither if it was not asked for."""
    plain, measured = cell("native"), cell("native")
    observed.add(measured)
    print_records([measured])
    out = capsys.readouterr().out
    assert re.search(r"J/token .*\n.* 0\.625 ", out)
    assert "0.41 ms, 52%: _up_kernel (experts)\n" in out and "route_kernel" not in out
    assert "\nncu --set full --kernel-name _up_kernel" in out
    print_records([plain])
    assert not re.search("J/token|ncu|kernel", capsys.readouterr().out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.sampled_from([80, 120]),
    rows=st.lists(
        st.tuples(st.text("abc_/", min_size=1, max_size=60), POSITIVE, st.none() | POSITIVE, MAYBE, st.booleans()),
        min_size=1,
        max_size=5,
    ),
)
def test_no_number_of_a_row_is_broken(
    width: int,
    rows: list[tuple[str, float, float | None, float | None, bool]],
    on_a_terminal: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever the records hold: every cell that is shown stands whole in one line, and no line is too long."""
    on_a_terminal(width)
    made = []
    for place, (router, p50, ratio, more, is_large) in enumerate(rows):
        one = cell(router, p50, more, batch=10**place, seq_len=4096 if is_large else 1)
        if ratio is not None:
            one.ratio_to_anchor = Ratio(anchor="0" * 12, p50=ratio, ci95_low=0.9 * ratio, ci95_high=ratio, rounds=3)
        made.append(one)
    print_sweep(made, ["router"])
    lines = printed(capsys)
    ends = (place for place, line in enumerate(lines) if line.startswith(("not shown", "every row", "warning")))
    end = next(ends, len(lines))
    assert all(len(line) <= width for line in lines[:end])
    named = re.search(r"not shown at \d+ columns: (.*?); moe-lab", " ".join(lines))
    left_out = named[1].split(", ") if named else []
    for column in table.columns(table.lines(made, ["router"])):
        if not column.is_name and column.heading not in left_out:
            assert all(any(cell in line for line in lines[:end]) for cell in column.cells), column


def test_warnings_that_differ_in_numbers_alone_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each batch would hide the others; all of them stand in the records."""
    cells = sweep(1, 8)
    for one in cells:
        one.warnings = [f"replays the same {one.config['batch'] + 1} tokens of 2,048"]
    cells[0].warnings.append("alone: 1.5")
    print_sweep(cells, ["router"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")][-2:] == [
        "warning (6 cells, for example): replays the same 2 tokens of 2,048",
        "warning (1 cell): alone: 1.5",
    ]


def test_each_machine_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """With its name; a cell that reached none stands in the first; with one machine no name is needed."""
    cells = [*sweep(1), *sweep(8)]
    lost = cell("native", batch=16)
    lost.env_id, lost.environment, lost.status, lost.reason = None, {}, "skipped", "unavailable: x"
    for number, one in enumerate(cells):
        one.env_id, name = ("a" * 12, "A100") if number < 3 else ("b" * 12, "H200")
        one.environment = {**one.environment, "device_name": name}
    print_sweep([*cells, lost], ["router"])
    lines = printed(capsys)
    first, second = lines.index("on A100 (aaaaaa):"), lines.index("on H200 (bbbbbb):")
    assert first == 0 and second == 2 + 4 + 1, "a line of headings, four rows, and what all of them share"
    assert sum(line.startswith(tuple(ROUTERS)) for line in lines[second:]) == 3
    print_sweep(cells[:3], ["router"])
    assert not any(line.startswith("on ") for line in printed(capsys))
