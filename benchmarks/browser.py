"""Opens a page in headless Chromium with a window size, a light or dark theme, and no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moe_lab.errors import UnavailableError


def start(*, offline: bool = True) -> Any:
    """A selenium driver of Chromium, `offline` without any network; `quit()` it.

    Raises:
        UnavailableError: selenium, Chromium or its driver is not installed.
    """
    try:
        from selenium import webdriver
    except ImportError as error:
        raise UnavailableError("selenium is not installed") from error
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        raise UnavailableError("Chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    driver.execute_cdp_cmd("Network.enable", {})
    network = {"offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", network)
    return driver


def show(driver: Any, page: Path, **view: Any) -> None:
    """Open `page` in a window as `emulate` makes it, and wait until all its plots are drawn."""
    emulate(driver, **view)
    driver.get(page.resolve().as_uri())
    driver.execute_async_script("""
        const done = arguments[0];
        (function wait() { performance.getEntriesByName("plots").length ? done() : setTimeout(wait, 20); })();
    """)


def emulate(driver: Any, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "screen") -> None:
    """Set the size of the view, and whether the system is dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
