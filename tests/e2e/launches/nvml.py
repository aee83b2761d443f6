"""A daemon whose NVIDIA driver is the fake one, and may be told to hang."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import wait_until

FAKE = Path(__file__).with_name("fake_nvml")


class Driver:
    """The fake driver.

    Args:
        folder: where it is told what to do; made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """What a daemon needs to find it."""
        path = os.pathsep.join([str(FAKE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, "FAKE_NVML": str(self._folder)}

    @property
    def calls(self) -> int:
        """How many calls it does not answer now."""
        return len(list(self._folder.glob("waiting-*")))

    @contextmanager
    def hangs(self) -> Iterator[None]:
        """Have it answer nothing for as long as the context lasts."""
        hang = self._folder / "hang"
        hang.touch()
        try:
            yield
            assert hang.exists()
        finally:
            hang.unlink()

    def wait_for_call(self, calls: int = 1) -> None:
        """Wait until so many calls get no answer."""
        wait_until(lambda: self.calls >= calls, describe=lambda: f"{self.calls} calls")
