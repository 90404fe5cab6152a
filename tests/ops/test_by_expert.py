"""ops/by_expert.py against a loop over the slots."""

from __future__ import annotations

import pytest
import torch

from moe_lab.ops.by_expert import by_expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32], ids=["float", "bool", "int"])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 1, 1), (37, 7, 7), (199, 12, 3)])
def test_each_value_is_at_its_expert(T: int, E: int, K: int, dtype: torch.dtype) -> None:
    """Unused slots leave nothing, and the rest is `fill`."""
    generator = torch.Generator().manual_seed(T)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].to(torch.int32)
    ids_TK[torch.rand(T, K, generator=generator) < 0.3] = -1
    values_TK = torch.randint(1, 9, (T, K), generator=generator).to(dtype)
    fill = (dtype == torch.bool and 0) or -1
    expected_TE = torch.full((T, E), fill, dtype=dtype)
    for token in range(T):
        for slot, expert in enumerate(ids_TK[token].tolist()):
            if expert >= 0:
                expected_TE[token, expert] = values_TK[token, slot]
    assert torch.equal(by_expert(values_TK, ids_TK, E, fill=fill), expected_TE)
