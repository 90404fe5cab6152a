"""A fixed piece of work that says how fast the machine itself is just now.

Clocks, neighbours and throttling change over minutes, which the replicates of one sweep do not see and two sweeps an
hour apart do. Timed in the same rounds as the cells, the probe tells such a change from one of the code.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.measure.clocks import Block, Step
from moe_lab.models import Output

_SIDE = {"cpu": 384, "cuda": 2048}  # of a square product: arithmetic
_STREAM_BYTES = {"cpu": 2**25, "cuda": 2**29}  # read once: memory beyond the caches


class Probe:
    """A matrix product and a pass over memory, in fp32; some milliseconds on a CPU, less on a GPU."""

    def __init__(self, device: torch.device):
        side, n_bytes = _SIDE[device.type], _STREAM_BYTES[device.type]
        self._square = torch.ones(side, side, device=device)
        self._matrix = torch.ones(n_bytes // 4096, 1024, device=device)
        self._step = Step(self._work, torch.ones(1024, device=device))  # type: ignore[arg-type]

    def _work(self, x: torch.Tensor) -> Output:
        product = torch.mm(self._square, self._square)
        return Output(self._matrix @ x + product[0, 0], ())

    def ms(self, n: int = 3) -> float:
        """Median milliseconds of `n` repeats."""
        block: Block = self._step.time_block(n)
        return float(np.median(block.ms))
