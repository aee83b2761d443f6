"""Log lines in the shape that vLLM and uvicorn write them, so that one reader serves both engines."""

import os
import time
import traceback


def write(text: str, descriptor: int = 1) -> bool:
    """Write `text` to a descriptor at once; says whether all of it was written.

    A log that cannot be written (disk full, reader gone) must not end the server, so what fails is dropped, as
    Python's logging drops it.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        return False
    return True


def fill(size: int) -> None:
    """Write exactly `size` bytes of lines to the log, or as many as it takes."""
    line = "bullpen sim: " + "." * 86 + "\n"
    block = line * 640
    while size > 0 and write(block[-size:]):
        size -= len(block)


class Log:
    """Writes the lines of one process of the simulator, named as vLLM names it (`APIServer`, `EngineCore`, …)."""

    def __init__(self, process: str) -> None:
        self._process = f"({process} pid={os.getpid()}) "

    def info(self, message: str, where: str) -> None:
        """Write an INFO line; `where` is the place in vLLM's source that writes it, like `core.py:133`."""
        self._line("INFO", message, where)

    def error(self, message: str, where: str) -> None:
        """Write an ERROR line."""
        self._line("ERROR", message, where)

    def plain(self, message: str) -> None:
        """Write a line without process, level and time, as uvicorn's and the progress bars' are."""
        write(message + "\n")

    def traceback(self, error: BaseException) -> None:
        """Write an exception's traceback to the error output, each line with the process's name, as vLLM does."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        write("".join(f"{self._process}{line}\n" for line in lines), descriptor=2)

    def _line(self, level: str, message: str, where: str) -> None:
        # A line break in a value (a model's name, say) must not begin a line of its own.
        message = message.replace("\n", "\\n")
        write(f"{self._process}{level} {time.strftime('%m-%d %H:%M:%S')} [{where}] {message}\n")
