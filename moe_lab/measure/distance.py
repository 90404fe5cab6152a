"""How far an output is from its reference."""

from __future__ import annotations

import math

from torch import Tensor


class Distance:
    """||y - reference|| and ||reference||, Frobenius, summed in fp64 over as many pieces as are added."""

    def __init__(self) -> None:
        self.largest, self._off, self._size = 0.0, 0.0, 0.0

    def add(self, y: Tensor, reference: Tensor) -> None:
        """One more piece."""
        for some, wanted in zip(y.flatten().split(1 << 22), reference.flatten().split(1 << 22), strict=True):
            off = some.double() - wanted.double()
            self._off += float(off.square().sum())
            self._size += float(wanted.double().square().sum())
            if off.numel() and not math.isnan(self.largest):
                largest = float(off.abs().max())
                self.largest = self.largest if largest <= self.largest else largest  # NaN stays

    def relative(self) -> float:
        """||y - reference|| / ||reference||; infinite if y holds anything not finite."""
        if not math.isfinite(self._off):
            return math.inf
        return math.sqrt(self._off / self._size) if self._size > 0 else (0.0 if self._off == 0 else math.inf)


def relative_error(y: Tensor, reference: Tensor) -> float:
    """See `Distance.relative`."""
    distance = Distance()
    distance.add(y, reference)
    return distance.relative()
