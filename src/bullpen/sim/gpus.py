"""Memory of mock GPUs: a file for each process on each GPU, which says how many MiB it holds there.

`BULLPEN_MOCK_GPU_DIR` names a folder with a sub-folder for each GPU, named by its index. In it, the file `total` says
how many MiB the GPU has (without it there is no limit), and a file named by a pid how many MiB that process holds. What
a process held ends with it, whether or not its file is still there.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class OutOfMemoryError(RuntimeError):
    """A GPU has less memory left than was asked for; shown under PyTorch's name, as in vLLM's log."""


OutOfMemoryError.__module__ = "torch"


class MockGpus:
    """What this process holds on its GPUs; with no folder, nothing is kept.

    Args:
        folders: one for each GPU that the process may see, in its order.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._held = 0

    def hold(self, mib: int) -> None:
        """Hold so many MiB on each GPU from now on. Raises OutOfMemoryError, and then holds what it held before."""
        before, done = self._held, []
        try:
            for number, folder in enumerate(self._folders):
                with _locked(folder):
                    _check(number, folder, before, mib)
                    _write(folder, mib)
                done.append(folder)
        except OutOfMemoryError:
            for folder in done:
                _write(folder, before)
            raise
        self._held = mib

    def release(self) -> None:
        """Hold nothing any more and take the files away."""
        for folder in self._folders:
            with suppress(OSError):
                _file(folder).unlink()


def held_by_others(folder: Path) -> int:
    """How many MiB of a GPU living processes other than this one hold."""
    pids = {int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()} - {os.getpid()}
    return sum(_number(folder / str(pid)) for pid in pids if _is_alive(pid))


def _check(number: int, folder: Path, before: int, mib: int) -> None:
    """Refuse to grow past what the GPU has; `number` is the GPU's place among those that the process sees."""
    total = _number(folder / "total")
    if not total or mib <= before:
        return
    free = max(0, total - held_by_others(folder) - before)
    if mib - before > free:
        raise OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {mib - before}.00 MiB. GPU {number} has a total capacity of "
            f"{total}.00 MiB of which {free}.00 MiB is free."
        )


def _write(folder: Path, mib: int) -> None:
    temporary = folder / f".{os.getpid()}"
    temporary.write_text(f"{mib}\n")
    temporary.rename(_file(folder))


def _file(folder: Path) -> Path:
    return folder / str(os.getpid())


def _number(file: Path) -> int:
    """The whole number in a file; 0 where there is none."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process look or write meanwhile, as a real allocation is one step."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}
