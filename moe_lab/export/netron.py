"""Netron, the viewer, on this machine's own address."""

from __future__ import annotations

from pathlib import Path

from moe_lab.errors import UnavailableError
from moe_lab.export.pair import MODEL


def show(folder: Path, *, browse: bool = True, port: int | None = None) -> None:
    """Serve the pair in `folder` and open a browser on it; returns when that is stopped (Ctrl-C).

    Raises:
        UnavailableError: Netron is not installed.
    """
    try:
        import netron
    except ImportError as error:
        raise UnavailableError("--open needs Netron: pip install 'moe-lab[netron]'") from error
    host, port_in_use = netron.start(str(folder / MODEL), ("127.0.0.1", port or 0), browse=browse)
    print(f"Netron shows {folder} at http://{host}:{port_in_use} (press Ctrl-C to stop)", flush=True)
    netron.wait()
