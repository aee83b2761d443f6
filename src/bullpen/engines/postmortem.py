"""The end of an ended engine's log, taken apart: its exceptions, and which of them is the root of the others.

One failure shows up several times. A worker prints its traceback; the engine core, which waited for it, prints another
that says to see the first; the API server, which waited for the engine core, prints a third. In between, processes
that lose their peers complain about that. What the user needs is the first, whole.
"""

import re
from dataclasses import dataclass, field

from bullpen.engines import logline
from bullpen.engines.logline import LogLine
from bullpen.engines.redact import redact

LOG_LIMIT = 65536
"""How many bytes at the end of a log are read."""

_LINE_LIMIT = 4000
_MESSAGE_LINES = 12
# Behind the last traceback come the lines of a shutdown and of leak checkers; a traceback further up is an old one.
_NEAR_END = 80

_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_][\w.]{0,200})(?:: (?P<message>.*))?$")
_FRAME = re.compile(r'  File "(?P<file>[^"]{1,1000})", line \d+')
_CHAINS = ("During handling of the above exception", "The above exception was the direct cause")

ENGINE_DIED = "EngineCore encountered an issue."
"""How vLLM's server refuses requests once its engine has died, in the moment before it ends itself."""

_WRAPPERS = (
    "Engine core initialization failed.",
    "Frontend process failed during engine core initialization.",
    "WorkerProc initialization failed due to an exception",
    ENGINE_DIED,
    "Executor failed.",
    "died unexpectedly.",
    "died with exit code",
)
_WORKER_FAILED = re.compile(r"Worker failed with error '(?P<error>.*)', please check the", re.DOTALL)
_CORE_FAILED = ("EngineCore failed to start.", "EngineCore encountered a fatal error.")
_CHILD_DIED = re.compile(r"(?:Worker|Engine core) proc (?P<name>\S+) died unexpectedly \(exit code:? (?P<code>-?\d+)\)")
_CORES_DIED = re.compile(r"Failed core proc\(s\): \{'(?P<name>[^']+)': (?P<code>-\d+)")
_CORE_LOST = "engine core exited unexpectedly"
_STOPPING = "[shutdown] API server: shutdown triggered"

# What a process says that is being ended, or whose peer has ended.
_CONSEQUENCES = {
    "BrokenPipeError",
    "CancelledError",
    "ConnectionResetError",
    "ContextTerminated",
    "DistBackendError",
    "EOFError",
    "GeneratorExit",
    "KeyboardInterrupt",
    "SystemExit",
}
_CONSEQUENCE = re.compile(r"NCCL error|Connection closed by peer|Connection reset by peer|^'/(?:psm|mp)[-_]\w+'$")
_BEHIND_SERVER = re.compile(r"EngineCore|ApiServer_|\w*Worker")
_NATIVE = re.compile(r"Fatal Python error: |terminate called |  what\(\): |!!!!!!! Segfault encountered")
_USAGE_ERROR = re.compile(r"[\w./ -]{1,100}?: error: (?P<message>.+)")


@dataclass(slots=True, eq=False)
class LoggedException:
    """An exception as a traceback ends with it.

    Attributes:
        process: who printed it, `EngineCore pid=7`; None where the line does not say.
        line: the number of the line with its name, the last of its traceback.
        kind: the class's name with its module.
        message: its text, at most a dozen lines.
        file: the source file that raised it.
        causes: those that it was raised from or after, oldest first.
    """

    process: str | None
    line: int
    kind: str = ""
    message: str = ""
    file: str = ""
    causes: list["LoggedException"] = field(default_factory=list)
    _lines: int = 0

    @property
    def name(self) -> str:
        """The class's name without its module."""
        return self.kind.rpartition(".")[2]

    @property
    def is_wrapper(self) -> bool:
        """Whether it only says that another process failed."""
        return any(text in self.message for text in _WRAPPERS) or _WORKER_FAILED.match(self.message) is not None

    @property
    def is_consequence(self) -> bool:
        """Whether it tells of a peer's end or of its own shutdown, rather than of a failure."""
        return self.name in _CONSEQUENCES or _CONSEQUENCE.search(self.message) is not None

    @property
    def in_engine(self) -> bool:
        """Whether a process behind the server printed it: the engine core, a worker, one of several API servers."""
        return self.process is not None and _BEHIND_SERVER.match(self.process) is not None

    def add(self, text: str) -> bool:
        """Take a further line of the message; False once there are enough."""
        self._lines += 1
        self.message += "\n" + text
        return self._lines < _MESSAGE_LINES


@dataclass(frozen=True, slots=True)
class EndedChild:
    """A process of the engine that ended and left no traceback of why.

    Attributes:
        name: its name where the log has it.
        exit_code: None where nobody tells; a signal's code is negative.
    """

    name: str | None
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Postmortem:
    """What the end of a log tells about the end of an engine.

    Attributes:
        root: the exception that everything followed from, None where no traceback explains the end.
        child: the process of the engine whose end brought the server down; None where none did.
        usage_error: the option parser's sentence.
        native: lines that the C runtime or the interpreter wrote as it gave up, newest first.
        errors: other lines of level ERROR near the end, newest first.
        interrupted: a signal ended the server while it started.
        empty: nothing was written at all.
    """

    root: LoggedException | None
    child: EndedChild | None
    usage_error: str | None
    native: list[str]
    errors: list[str]
    interrupted: bool
    empty: bool


def read(tail: bytes) -> Postmortem:
    """Take the end of a log apart, secrets taken out; of more than `LOG_LIMIT` bytes the last are read."""
    if len(tail) > LOG_LIMIT:
        tail = tail[-LOG_LIMIT:].partition(b"\n")[2]  # half a line could be half a secret
    reader = _Reader()
    for line in redact(logline.plain(tail)).split("\n"):
        reader.take(logline.parse(line[:_LINE_LIMIT]))
    return reader.result()


class _Reader:
    """Goes through the lines once, following each process's tracebacks through the others' lines between them."""

    def __init__(self) -> None:
        self.number = 0
        self.empty = True
        self.exceptions: list[LoggedException] = []
        self.open: dict[tuple[str | None, str | None, str | None], LoggedException] = {}
        self.chained: dict[tuple[str | None, str | None, str | None], list[LoggedException]] = {}
        self.native: list[str] = []
        self.errors: list[tuple[int, str]] = []
        self.usage: list[str] = []
        self.core_failed: list[tuple[int, str | None]] = []
        self.lost: list[tuple[int, EndedChild]] = []
        self.stopping_at: int | None = None

    def take(self, line: LogLine) -> None:
        """Read the next line."""
        self.number += 1
        self.empty = self.empty and not line.text
        if line.text.startswith("Traceback (most recent call last):"):
            self.open[line.writer] = LoggedException(
                line.process, self.number, causes=self.chained.pop(line.writer, [])
            )
        elif not self._continues(line):
            self._take_alone(line)

    def _continues(self, line: LogLine) -> bool:
        """Whether the line belongs to a traceback that is open."""
        exception = self.open.get(line.writer)
        if exception is None:
            return False
        if line.text.startswith(_CHAINS):
            self.chained[line.writer] = [*exception.causes, exception]
            del self.open[line.writer]
        elif exception.kind:
            if _is_alone(line) or not exception.add(line.text):
                del self.open[line.writer]
                return not _is_alone(line)
        elif frame := _FRAME.match(line.text):
            exception.file = frame["file"]
        elif line.text and not line.text.startswith(" "):
            if match := _EXCEPTION.match(line.text):
                exception.line, exception.kind, exception.message = self.number, match["type"], match["message"] or ""
                self.exceptions.append(exception)
            else:
                del self.open[line.writer]
        return True

    def _take_alone(self, line: LogLine) -> None:
        text = line.text
        if text.startswith(_CORE_FAILED):
            self.core_failed.append((self.number, line.process))
        elif child := _CHILD_DIED.search(text):
            self.lost.append((self.number, EndedChild(child["name"], int(child["code"]))))
        elif _CORE_LOST in text:
            self.lost.append((self.number, EndedChild(None, None)))
        elif text.startswith(_STOPPING):
            self.stopping_at = self.stopping_at or self.number
        elif _NATIVE.match(text):
            self.native.insert(0, text)
        elif line.level in ("ERROR", "CRITICAL"):
            self.errors.insert(0, (self.number, text))
        elif line.level is None and (usage := _USAGE_ERROR.match(text)):
            self.usage = [usage["message"]]
        elif self.usage and line.level is None:
            self.usage.append(text)

    def result(self) -> Postmortem:
        """What the lines come to."""
        child = self._ended_child()
        root = self._root(child is not None)
        return Postmortem(
            root=root,
            child=child,
            usage_error="\n".join(self.usage[:_MESSAGE_LINES]) if self.usage else None,
            native=self.native,
            errors=[text for number, text in self.errors if self._is_near_end(number)],
            interrupted=any(e.name == "KeyboardInterrupt" and self._is_near_end(e.line) for e in self.exceptions),
            empty=self.empty,
        )

    def _is_near_end(self, number: int) -> bool:
        return number > self.number - _NEAR_END

    def _ended_child(self) -> EndedChild | None:
        """The engine process whose end brought the server down, unless the server was being stopped before that."""
        ends = [number for number, _ in (*self.lost, *self.core_failed)]
        ends += [exception.line for exception in self.exceptions if exception.is_wrapper]
        if not ends or (self.stopping_at is not None and self.stopping_at < min(ends)):
            return None
        known = [child for _, child in self.lost if child.exit_code is not None]
        for exception in self.exceptions:
            # A code above 0 only says that the core gave up for another process's sake.
            if match := _CORES_DIED.search(exception.message):
                known.append(EndedChild(match["name"], int(match["code"])))
        return known[0] if known else EndedChild(None, None)

    def _root(self, engine_ended: bool) -> LoggedException | None:
        if not engine_ended:
            failures = [e for e in self.exceptions if not e.is_consequence and self._is_near_end(e.line)]
            return failures[-1] if failures else None
        for number, process in self.core_failed:
            own = [e for e in self.exceptions if e.process == process and e.line >= number]
            if own and not own[0].is_wrapper:
                return self._outermost(own[0])
            if found := self._of_engine(before=number):
                return found
        last = max((e.line for e in self.exceptions if e.is_wrapper), default=self.number)
        return self._of_engine(before=last, after=last - 2 * _NEAR_END) or self._unwrapped()

    def _of_engine(self, before: int, after: int = 0) -> LoggedException | None:
        failures = [e for e in self.exceptions if e.in_engine and not e.is_wrapper and after < e.line < before]
        failures = [e for e in failures if not e.is_consequence] or failures
        return failures[-1] if failures else None

    def _outermost(self, exception: LoggedException) -> LoggedException:
        """The last exception of the chain that this one began."""
        raised_from = [e for e in self.exceptions if exception in e.causes]
        return raised_from[-1] if raised_from else exception

    def _unwrapped(self) -> LoggedException | None:
        """The worker's message inside the engine core's, for a log whose part with the worker's own is gone."""
        for exception in self.exceptions:
            if match := _WORKER_FAILED.match(exception.message):
                return LoggedException(exception.process, exception.line, message=match["error"])
        return None


def _is_alone(line: LogLine) -> bool:
    """Whether a bare line begins something of its own, so that a message before it has ended."""
    text = line.text
    return line.level is None and (_NATIVE.match(text) is not None or text.startswith(("Process ", "nanobind: ", "/")))
