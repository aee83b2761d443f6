"""Why an instance ended, in one sentence: from its exit code and the end of its log."""

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bullpen.engines import causes, postmortem
from bullpen.engines.causes import CrashClass
from bullpen.engines.postmortem import EndedChild, LoggedException, Postmortem
from bullpen.engines.redact import is_secret_option, redact

__all__ = ["CrashClass", "Failure", "classify"]

SENTENCE_LIMIT = 300
"""How many characters a failure's message has at most."""

_QUOTE_LIMIT = 200
_NATIVE_SIGNALS = {
    signal.SIGILL: "an instruction that this CPU refuses; on the CPU, --dtype float32 avoids those of bfloat16",
    signal.SIGABRT: "the code itself gave up; its last lines are in the log",
    signal.SIGBUS: "often a full /dev/shm or a file cut short while it was read",
    signal.SIGFPE: "an impossible calculation",
    signal.SIGSEGV: "a fault of the engine or of a library under it; try --enforce-eager or another version",
}
_NATIVE_NAMES = {
    "Illegal instruction": signal.SIGILL,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating point exception": signal.SIGFPE,
    "Segmentation fault": signal.SIGSEGV,
    "Segfault": signal.SIGSEGV,
}
_SOMEBODY = "by somebody or some program on this host: the kernel's out-of-memory killer has killed nothing"
_KERNEL = "by the kernel's out-of-memory killer: look in dmesg, and give the host more free memory"

# What pydantic wraps a refused value in: "1 validation error for ModelConfig\n  Value error, … [type=value_error, …]".
_VALIDATION = re.compile(r"\d+ validation errors? for \w+\s*")
_VALIDATION_KIND = re.compile(r"(?:Value error|Assertion failed), ")
_OPTION = re.compile(r"--?[A-Za-z][\w.-]{0,60}(?:=|$)")
_CONFIGURATION_FILES = re.compile(r"/vllm/(?:config/|engine/arg_utils|entrypoints/.*cli_args|platforms/)")


@dataclass(frozen=True)
class Failure:
    """Why an instance failed.

    Attributes:
        kind: the class, for programs.
        message: one sentence for the user: what happened, and the way out. It holds no secret and no line break.
    """

    kind: CrashClass
    message: str


def classify(
    exit_code: int | None,
    log_tail: bytes,
    *,
    model: str | None = None,
    port: int | None = None,
    oom_kills: int | None = None,
) -> Failure | None:
    """Say why an instance ended; None for a normal end.

    Args:
        exit_code: the server process's own; a signal's is negative; None where nobody saw it.
        log_tail: the end of its log; 64 KiB suffice, of more the last are read.
        model: what the options call the model, for the sentence.
        port: where the server was to listen, for the sentence.
        oom_kills: how many processes the kernel's out-of-memory killer has ended on this host meanwhile; None where
            that is not known.
    """
    log = postmortem.read(log_tail)
    if exit_code == 0 and log.child is None:
        return None
    known = {"model": model or "the model", "port": f"port {port}" if port else "its port"}
    failure = _from_log(exit_code, log, known) or _from_exit(exit_code, log)
    message = failure.message
    if oom_kills == 0:
        message = message.replace(f"most likely {_KERNEL}", _SOMEBODY)
    return Failure(failure.kind, _sentence(message))


def _from_log(exit_code: int | None, log: Postmortem, known: dict[str, str]) -> Failure | None:
    """What the log says about the end; None where it says nothing about it."""
    if log.usage_error and exit_code in (2, None):
        return _usage(log.usage_error)
    if exit_code is not None and exit_code < 0 and log.child is None:
        return _known(log.native, known)
    if cause := _known(_texts(log), known):
        return cause
    if log.root and (exit_code is not None or log.child):
        return _quoted(log.root)
    return _ended_child(log, log.child) if log.child else None


def _texts(log: Postmortem) -> Iterator[str]:
    """Where a known cause may be named, the most telling first."""
    if log.root:
        for exception in (log.root, *reversed(log.root.causes)):
            yield f"{exception.kind}: {exception.message}"
    yield from log.native
    if log.root is None:
        yield from log.errors


def _known(texts: Iterable[str], known: dict[str, str]) -> Failure | None:
    found = (causes.find(text, known) for text in texts)
    return next((Failure(*cause) for cause in found if cause), None)


def _usage(sentence: str) -> Failure:
    """The option parser's refusal."""
    if sentence.startswith("unrecognized arguments: "):
        # The words between them are values, which could be anybody's secret.
        options = [word.partition("=")[0] for word in sentence.split()[2:] if _OPTION.match(word)]
        named = f"has no option {', '.join(options)}" if options else "takes no further words without an option's name"
        return Failure(CrashClass.BAD_OPTION, f"the engine {named}; correct the instance's options")
    reason = sentence.removeprefix("argument ")
    option, _, rest = reason.partition(": ")
    if is_secret_option(option):
        reason = f"{option} has a value that is not accepted"
    elif rest and reason != sentence:
        reason = f"{option.partition('/')[0]}: {_unwrapped(rest)}"
    return Failure(CrashClass.BAD_OPTION, f"the engine refuses its options: {_cut(reason)}")


def _quoted(root: LoggedException) -> Failure:
    """A failure that no row of the table knows, in the engine's own words."""
    text = _unwrapped(root.message)
    if root.name == "ValidationError" or (
        root.name in ("ValueError", "AssertionError") and _CONFIGURATION_FILES.search(root.file)
    ):
        return Failure(CrashClass.BAD_OPTION, f"the engine refuses its options: {_cut(text)}")
    words = ": ".join(part for part in (root.name, text) if part)
    return Failure(CrashClass.ERROR, f"the engine failed with {_cut(words)}; its log has the traceback")


def _ended_child(log: Postmortem, child: EndedChild) -> Failure:
    """A process of the engine ended without a word."""
    name = f"the engine's process {child.name}" if child.name else "a process of the engine"
    if child.exit_code is not None and child.exit_code < 0:
        return _signalled(name, -child.exit_code, CrashClass.ENGINE_DIED)
    if native := _native(log, name):
        return native
    if child.exit_code:
        return Failure(
            CrashClass.ENGINE_DIED, f"{name} ended with exit code {child.exit_code} and left no reason in the log"
        )
    return Failure(CrashClass.ENGINE_DIED, f"{name} ended without a word, killed most likely {_KERNEL}")


def _from_exit(exit_code: int | None, log: Postmortem) -> Failure:
    """What is left to say where the log does not explain the end."""
    if exit_code is None:
        return Failure(CrashClass.UNKNOWN, "it ended while nobody was watching, and its log does not say why")
    if exit_code < 0:
        return _signalled("the server process", -exit_code, CrashClass.KILLED)
    if native := _native(log, "the server process"):
        return native
    if exit_code > 128 and _signal_name(exit_code - 128):  # as a shell in between reports a signal
        return _signalled("the server process", exit_code - 128, CrashClass.KILLED)
    if log.interrupted:
        return Failure(CrashClass.KILLED, "the server process was ended by SIGTERM or SIGINT while it started")
    said = "it wrote nothing to its log" if log.empty else "its log shows no error"
    if log.errors:
        said = f"its log ends with the error: {_cut(log.errors[0])}"
    return Failure(CrashClass.ERROR, f"the server process ended with exit code {exit_code}; {said}")


def _native(log: Postmortem, name: str) -> Failure | None:
    for line in log.native:
        for words, number in _NATIVE_NAMES.items():
            if words in line:
                return _signalled(name, number, CrashClass.NATIVE_CRASH)
    return None


def _signalled(name: str, number: int, kind: CrashClass) -> Failure:
    """A process ended by a signal; `kind` is for a signal that came from outside it."""
    called = _signal_name(number) or f"signal {number}"
    if reason := _NATIVE_SIGNALS.get(signal.Signals(number) if _signal_name(number) else signal.SIGCHLD):
        return Failure(CrashClass.NATIVE_CRASH, f"{name} crashed in native code ({called}): {reason}")
    if number == signal.SIGKILL:
        return Failure(kind, f"{name} was killed ({called}), most likely {_KERNEL}")
    return Failure(kind, f"{name} was ended from outside by {called}")


def _signal_name(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def _unwrapped(message: str) -> str:
    """An exception's message without what pydantic puts around it, the refused input above all."""
    if wrapper := _VALIDATION.match(message):
        message = message[wrapper.end() :].partition("[type=")[0]
        if kind := _VALIDATION_KIND.match(message):
            message = message[kind.end() :]
    return message.strip()


def _cut(text: str) -> str:
    """A quotation in one line and of bearable length."""
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _QUOTE_LIMIT else text[: _QUOTE_LIMIT - 1].rstrip() + "…"


def _sentence(text: str) -> str:
    """The last line of defence: no secret, no control character, no more than `SENTENCE_LIMIT` characters."""
    text = redact(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
    return text if len(text) <= SENTENCE_LIMIT else text[: SENTENCE_LIMIT - 1].rstrip() + "…"
