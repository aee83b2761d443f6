"""What one line of an engine's log is made of: who wrote it, how bad it is, and the message itself.

vLLM puts a header before each line of its own logger, `(EngineCore pid=7) INFO 11-20 22:51:01 [core.py:402] `, and
repeats it on every line of a message of several lines. uvicorn writes `INFO:     `. Progress bars, tracebacks and C
libraries write bare lines, which vLLM up to 0.30 and the simulator still mark with the process: `(EngineCore pid=7) `.
"""

import re
from dataclasses import dataclass

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Deleted rather than replaced, so that a secret cannot hide behind a character in its middle.
_CONTROLS = {code: None for code in (*range(9), 11, 12, *range(14, 32), 127)}

# The header may stand behind a user's VLLM_LOGGING_PREFIX, so it is searched, but only near the line's beginning.
_HEADER_WITHIN = 300
_HEADER = re.compile(
    r"(?:\((?P<process>[^()\n]{1,80} pid=\d+)\) )?"
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[(?P<place>[^\]\s]{1,200}:\d+)\] ?"
)
_PROCESS = re.compile(r"\((?P<process>[^()\n]{1,80} pid=\d+)\) ?")
_UVICORN = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL): +")
_RANK = re.compile(r"\[rank\d+\]: ?")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log without its header.

    Attributes:
        process: `EngineCore pid=7`, or None where the line does not say.
        level: `INFO`, `ERROR`, …; None for a line that no logger wrote.
        place: `core.py:402`, the place in vLLM's source; None where the line does not say.
        text: the rest, indentation included.
    """

    process: str | None
    level: str | None
    place: str | None
    text: str

    @property
    def writer(self) -> tuple[str | None, str | None, str | None]:
        """What consecutive lines of one message have in common."""
        return self.process, self.level, self.place


def plain(data: bytes) -> str:
    """Text of log bytes: bad UTF-8 replaced, colours and control characters gone, a line break as `\\n` alone."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return _ESCAPES.sub("", text).translate(_CONTROLS)


def parse(line: str) -> LogLine:
    """Take a line's header off. The line is one of `plain` text, without its line break."""
    if header := _HEADER.search(line, 0, _HEADER_WITHIN):
        return LogLine(header["process"], header["level"], header["place"], line[header.end() :])
    process = None
    if named := _PROCESS.match(line):
        process, line = named["process"], line[named.end() :]
    if uvicorn := _UVICORN.match(line):
        return LogLine(process, uvicorn["level"], None, line[uvicorn.end() :])
    if rank := _RANK.match(line):
        line = line[rank.end() :]
    return LogLine(process, None, None, line)
