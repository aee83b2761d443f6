"""As much of PyTorch as the process under test uses; its tensors are Python ranges, and hold a mock GPU's memory."""

from __future__ import annotations

import os
from pathlib import Path

int64 = "int64"
held = 0


def arange(first: int, end: int, dtype: str, device: str) -> range:
    """A tensor; the first of each place is kept and counts, those made to compare are not."""
    global held
    assert (dtype, device) == ("int64", "cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    place = Path(os.environ["MOCK_GPU"]) / str(os.getpid())
    held = max(held, end // 2**17)
    if not place.exists() or int(place.read_text()) < held:
        place.write_text(str(held))
    changed = (place.parent / "changed").exists()
    return range(first + changed, end + changed)


def equal(one: range, other: range) -> bool:
    """Whether two tensors have the same values."""
    return one == other
