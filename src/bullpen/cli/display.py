"""What a display that goes on by itself has, whatever it shows: animated on a terminal, not elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

FRAMES_PER_SECOND = 12.5


class LiveDisplay(ABC):
    """Shows `_render` anew many times a second, from ``with`` on, where the console can.

    A class of this kind calls this constructor at the end of its own: Rich asks for the first frame at once.

    Args:
        console: where; elsewhere than on a terminal `_live` is None and nothing is animated.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        animated = console.is_terminal and not console.is_dumb_terminal
        self._live = self._new_live() if animated else None

    @abstractmethod
    def _render(self) -> RenderableType:
        """What is to be seen now. May be called by another thread."""

    def _new_live(self, frames: float = FRAMES_PER_SECOND) -> Live:
        """Another one, of so many frames a second."""
        return Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=frames,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
