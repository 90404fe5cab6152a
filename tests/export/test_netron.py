"""Netron itself, in headless Chromium: the pair opens as ONNX, its functions open, and the router is a node."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.export import pairs
from tests.results import browser

pytest.importorskip("netron", reason="netron is not installed")
_WAIT_S = 30.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the viewer serves a decoder with Sinkhorn."""
    folder = tmp_path_factory.mktemp("netron") / "pair"
    pairs.export(pairs.compose("decoder_moe", "router=sinkhorn"), folder)
    program = "import sys; from pathlib import Path; from moe_lab.export import netron; "
    command = pairs.python("-u", "-c", program + "netron.show(Path(sys.argv[1]), browse=False)", str(folder))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = iter(server.stdout.readline, "")
            yield next(line for line in lines if "Netron shows" in line).split(" at ")[1].split()[0]
        finally:
            server.kill()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The graph on the screen."""
    driver = browser.start(offline=False)
    try:
        browser.emulate(driver, width=1400, height=1400)
        driver.get(address)
        until(driver, "Netron's welcome", lambda: accept(driver) or nodes(driver))
        until(driver, "the graph", lambda: nodes(driver))
        yield driver
    finally:
        driver.quit()


def until(driver: Any, what: str, there: Any) -> Any:
    """What `there` gives once it is true."""
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        if found := there():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come: {driver.execute_script('return document.body.innerText')[:500]}")


def accept(driver: Any) -> bool:
    """Click away what Netron says to a newcomer."""
    return bool(
        driver.execute_script("""
            const button = [...document.querySelectorAll("button")].find(b => b.textContent.trim() == "Accept");
            if (button) button.click();
            return button;
        """)
    )


def nodes(driver: Any) -> list[str]:
    """The operators of the graph that is shown."""
    return list(
        driver.execute_script("""
            const titles = [...document.querySelectorAll("g.node > g.node-item-type:first-child > text")];
            return titles.map(title => title.textContent);
        """)
    )


def open_function(driver: Any, kind: str) -> list[str]:
    """Click the sign on the first node of that kind; what is shown then."""
    before = nodes(driver)
    assert kind in before

    def inside() -> list[str]:
        if (now := nodes(driver)) and now != before:
            return now
        driver.execute_script(_CLICK, kind)  # again, if it was still busy
        time.sleep(0.3)
        return []

    return list(until(driver, f"the inside of {kind}", inside))


_CLICK = """
    for (const node of document.querySelectorAll("g.node")) {
        const items = [...node.querySelectorAll(":scope > g.node-item-type")];
        if (items.length == 2 && items[0].querySelector("text").textContent == arguments[0])
            return items[1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
    }
"""


@pytest.mark.browser
@pytest.mark.slow
def test_the_router_is_found_from_the_top(page: Any) -> None:
    """Block, in it the MoE layer, in it the router, in it Sinkhorn, in it a Loop."""
    assert page.title != "Netron" or nodes(page)
    assert nodes(page) == ["Rope", "Embedding", "Block", "Block_2", "add_rms_norm", "Linear"]
    inside = open_function(page, "Block")
    assert {"Attention", "MoELayer"} <= set(inside)
    inside = open_function(page, "MoELayer")
    assert "Sinkhorn" in inside and "experts_mlp" in inside
    assert "sinkhorn_scores" in open_function(page, "Sinkhorn")
    assert "Loop" in open_function(page, "sinkhorn_scores")
