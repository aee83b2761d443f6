"""A program to be suspended: it holds tensors on the GPU, and says whether they still are what they were.

``python -m bench.gpu_holder MIB [MIB …]`` holds the first number of MiB; a child of it, started with the rest, holds
the next, and so on. Talks in lines of JSON: it prints ``{"pids": […]}`` once everything is there, and answers each line
on its standard input with ``{"equal": …, "seconds": …}``: whether every value of every process is as it was written,
which takes the GPU's work, and how long it took to find out. Ends with its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

CHUNK_MIB = 256
VALUES_PER_MIB = 2**20 // 8
"""Of 64 bits."""


def make(first: int, mib: int) -> Any:
    """A tensor that counts up from ``first``; so none of its values is another's."""
    return torch.arange(first, first + mib * VALUES_PER_MIB, dtype=torch.int64, device="cuda")


def chunks(mib: int) -> list[tuple[int, int]]:
    """Where each tensor begins to count, and its MiB."""
    return [(place * VALUES_PER_MIB, min(CHUNK_MIB, mib - place)) for place in range(0, mib, CHUNK_MIB)]


def is_intact(held: list[Any], mib: int) -> bool:
    """Whether all tensors hold what was written; each is compared with one made anew."""
    return all(
        bool(torch.equal(tensor, make(first, size))) for tensor, (first, size) in zip(held, chunks(mib), strict=True)
    )


def main(sizes: list[int]) -> None:
    """Hold memory, and answer."""
    mib, rest = sizes[0], sizes[1:]
    child = None
    if rest:
        command = [sys.executable, "-m", "bench.gpu_holder", *map(str, rest)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    held = [make(first, size) for first, size in chunks(mib)]
    is_intact(held, mib)  # so that what a comparison takes is held from the beginning
    pids = [os.getpid(), *(hear(child)["pids"] if child else [])]
    print(json.dumps({"pids": pids}), flush=True)
    for line in sys.stdin:
        begun = time.monotonic()
        if child is not None and child.stdin is not None:
            child.stdin.write(line)
            child.stdin.flush()
        equal = is_intact(held, mib)
        equal = (hear(child)["equal"] if child else True) and equal
        print(json.dumps({"equal": equal, "seconds": time.monotonic() - begun}), flush=True)
    if child is not None:
        child.communicate()


def hear(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The child's next line."""
    assert child.stdout is not None
    answer: dict[str, Any] = json.loads(child.stdout.readline())
    return answer


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]])
