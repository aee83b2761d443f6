"""The files of a batch job, in the format of OpenAI's batch API: requests in, results out.

While the job goes on, each result is appended to ``OUTPUT.partial`` as it comes, so whoever goes on with the job knows
what is done. When all are there, they are put into the order of the requests: then the output appears, and the other
file goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bullpen.client.errors import ClientError, InvalidRequest
from bullpen.client.launch_errors import Conflict

FIELDS: Mapping[str, tuple[type, str]] = {
    "custom_id": (str, "a text of your choice, another one in each line"),
    "method": (str, '"POST"'),
    "url": (str, 'a path, such as "/v1/chat/completions"'),
    "body": (dict, "the object that is sent there"),
}
"""The fields of a request: the type of each, and what to write there."""
COMPLAINTS = 10
"""How many wrong lines an error names at most."""
MISSING = -1


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input.

    Attributes:
        url: a path, such as ``/v1/chat/completions``.
    """

    custom_id: str
    url: str
    body: Mapping[str, Any]


def read_requests(path: Path) -> Iterator[Request]:
    """The requests of an input file that was checked, one after the other.

    Raises:
        InvalidRequest: the file has become another one.
    """
    for number, line in read_lines(path):
        try:
            yield read_request(line)
        except ValueError as problem:
            raise InvalidRequest(f"{path}, line {number}: {problem}", field="input") from problem


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of an input file with their numbers, from 1; blank ones are left out.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except OSError as problem:
        raise InvalidRequest(f"{path} cannot be read: {problem.strerror}", field="input") from problem


def read_request(line: bytes) -> Request:
    """Read one line.

    Raises:
        ValueError: it is no request; the text says what to change.
    """
    document = read_object(line)
    for name, (kind, meaning) in FIELDS.items():
        if not isinstance(document.get(name), kind):
            wrong = "is of the wrong kind" if name in document else "is missing"
            raise ValueError(f"{name!r} {wrong}; give {meaning}")
    if document["method"] != "POST":
        raise ValueError(f"the method is {document['method']!r}; every request of a batch is a POST")
    url, body = document["url"], document["body"]
    if not (url.startswith("/") and url.isascii() and url.isprintable() and " " not in url):
        raise ValueError(f"url is {url!r}; give {FIELDS['url'][1]}, without the server's name")
    if body.get("stream"):
        raise ValueError("a batch has whole answers; leave 'stream' out of the body")
    return Request(document["custom_id"], url, body)


def read_object(line: bytes) -> Mapping[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: it has none.
    """
    try:
        document = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"this is no JSON ({problem}); write one object in each line") from problem
    if not isinstance(document, dict):
        raise ValueError("this is no JSON object; write {…} with " + ", ".join(FIELDS))
    return document


def refuse_constant(name: str) -> None:
    """Refuse what Python alone takes for JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is no JSON value")


def check_requests(path: Path) -> dict[str, int]:
    """Check every line of an input file; the place of each id, from 0.

    Raises:
        InvalidRequest: lines are no requests, or have the same id; the text has them all, or the first few.
    """
    places: dict[str, int] = {}
    numbers: dict[str, int] = {}
    complaints: list[str] = []
    for number, line in read_lines(path):
        try:
            request = read_request(line)
        except ValueError as problem:
            complaints.append(f"line {number}: {problem}")
            continue
        first = numbers.setdefault(request.custom_id, number)
        if first != number:
            both = f"lines {first} and {number} have the same custom_id {request.custom_id!r}"
            complaints.append(f"{both}; give each line its own")
        else:
            places[request.custom_id] = len(places)
    if complaints:
        raise InvalidRequest(wrong_lines(path, complaints), field="input")
    return places


def wrong_lines(path: Path, complaints: Sequence[str]) -> str:
    """The sentence about wrong lines; more than one of them are a line each."""
    if len(complaints) == 1:
        return f"{path}, {complaints[0]}. Nothing was sent"
    rest = len(complaints) - COMPLAINTS
    shown = [*complaints[:COMPLAINTS], *([f"and {rest} more"] if rest > 0 else [])]
    return f"{path} has {len(complaints)} mistakes; nothing was sent:" + "".join(f"\n  {one}" for one in shown)


class Results:
    """The results of one job, which nobody else writes meanwhile; a context manager.

    Args:
        output: where all results shall be in the end. Those that are there already count.
        source: the requests.
        places: of the ids in `source`, by `check_requests`.

    Attributes:
        done: how many results there are.
        failed: how many of them are no success.

    Raises:
        Conflict: another job writes them.
        ClientError: they cannot be written.
        InvalidRequest: the files hold something else than results of this input.
    """

    def __init__(self, output: Path, source: Path, places: Mapping[str, int]) -> None:
        self._output = output.resolve()
        self._source = source
        self._partial = self._output.with_name(f"{self._output.name}.partial")
        self._places = places
        self._starts = array("q", [MISSING]) * len(places)
        self._size = self.done = self.failed = 0
        with writing(self._partial):
            if self._output == source.resolve() or (self._output.exists() and not self._output.is_file()):
                raise InvalidRequest(f"{output} is no file for results; name another one", field="output")
            self._descriptor = self._open()
        try:
            self._check(self._partial)
            self._check(self._output)
            self._read_partial()
            self._is_finished = self._read_output()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        while True:
            descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                text = f"another job is writing {self._output}; wait for it, or name another file"
                raise Conflict(text, 409) from None
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)  # another job has just finished

    def _check(self, path: Path) -> None:
        """Refuse results of requests that have changed since, before anything is taken over."""
        ids = {place: read_result(line).get("id") for place, line, _ in self._read(path)} if path.exists() else {}
        if not ids:
            return
        for place, request in enumerate(read_requests(self._source)):
            if place in ids and ids[place] != result_id(request):
                raise InvalidRequest(
                    f"{path} has the result of another request that was called {request.custom_id!r} too;"
                    f" name another file for the results of {self._source}, or remove that one",
                    field="output",
                )

    def _read_partial(self) -> None:
        for place, line, is_good in self._read(self._partial):
            if self._starts[place] == MISSING:
                self._note(place, self._size, is_good)
            self._size += len(line)
        with writing(self._partial):
            os.ftruncate(self._descriptor, self._size)  # its writer was killed in the middle of a line

    def _read_output(self) -> bool:
        """Take over what an earlier run has finished; whether that is all there is to do."""
        if not self._output.exists():
            return False
        found = 0
        is_ordered = True
        for place, line, is_good in self._read(self._output):
            is_ordered = is_ordered and place == found
            found += 1
            if self._starts[place] == MISSING:
                self._append(place, line, is_good)
        return is_ordered and found == len(self._places)

    def _read(self, path: Path) -> Iterator[tuple[int, bytes, bool]]:
        """The place of each whole line of results, the line, and whether it is a success."""
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                result = read_result(line)
                place = self._places.get(str(result.get("custom_id")))
                if place is None or not {"response", "error"} <= result.keys():
                    raise InvalidRequest(
                        f"{path}, line {number} is no result of {self._source}: its custom_id is"
                        f" {result.get('custom_id')!r}; remove that file, or name another one for the results",
                        field="output",
                    )
                yield place, line, is_success(result)

    def has(self, place: int) -> bool:
        """Whether there is a result of the request at a place."""
        return self._starts[place] != MISSING

    def write(self, place: int, result: Result) -> None:
        """Add a result.

        Raises:
            ClientError: it cannot be written.
        """
        self._append(place, result.line, result.is_success)

    def _append(self, place: int, line: bytes, is_good: bool) -> None:
        view, start = memoryview(line), self._size
        with writing(self._partial):
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                os.ftruncate(self._descriptor, start)  # or what comes next would belong to half a line
                raise
        self._size += len(line)
        self._note(place, start, is_good)

    def _note(self, place: int, start: int, is_good: bool) -> None:
        self._starts[place] = start
        self.done += 1
        self.failed += not is_good

    def sync(self) -> None:
        """Force what was written onto the disk.

        Raises:
            ClientError: that cannot be done.
        """
        with writing(self._partial):
            os.fsync(self._descriptor)

    def finish(self) -> None:
        """Put all results in order into the output.

        Raises:
            ClientError: it cannot be written.
        """
        ordered = self._output.with_name(f"{self._output.name}.ordered")
        with writing(self._output):
            if not self._is_finished:
                with self._partial.open("rb") as results, ordered.open("wb") as file:
                    for start in self._starts:
                        results.seek(start)
                        file.write(results.readline())
                    file.flush()
                    os.fsync(file.fileno())
                ordered.replace(self._output)
                self._is_finished = True
            self._partial.unlink()

    def close(self) -> None:
        """Let others have the files; one without results goes."""
        status = os.fstat(self._descriptor)
        if status.st_nlink and not status.st_size:
            self._partial.unlink(missing_ok=True)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others have the files."""
        self.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except OSError as problem:
        text = f"{path} cannot be written: {problem.strerror}"
        raise ClientError(f"{text}. Make that possible, and run the job again: it goes on where it is") from problem


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to a request.

    Attributes:
        status: the HTTP status.
        request_id: its own name for the request, where it told it beside the body.
    """

    status: int
    body: bytes
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the output, and whether it is a success."""

    line: bytes
    is_success: bool


def read_result(line: bytes) -> Mapping[str, Any]:
    """The object of a line of results; an empty one where there is none."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def answered(request: Request, answer: Answer) -> Result:
    """The result of a request that was answered, whatever the status."""
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        body = answer.body.decode(errors="replace")
    number = answer.request_id or (body.get("id") if isinstance(body, dict) else None)
    return new_result(request, {"status_code": answer.status, "request_id": number or "", "body": body}, None)


def failed(request: Request, code: str, message: str) -> Result:
    """The result of a request that has no answer."""
    return new_result(request, None, {"code": code, "message": message})


def new_result(request: Request, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> Result:
    """A result as the format has it."""
    document = {"id": result_id(request), "custom_id": request.custom_id, "response": response, "error": error}
    return Result(json.dumps(document).encode() + b"\n", is_success(document))


def result_id(request: Request) -> str:
    """The id of a request's result. It tells what was asked, so that no result is taken for another request's."""
    asked = json.dumps([request.custom_id, request.url, request.body], sort_keys=True, separators=(",", ":"))
    return f"batch_req_{hashlib.sha256(asked.encode()).hexdigest()[:32]}"


def is_success(result: Mapping[str, Any]) -> bool:
    """Whether a result is an answer with status 200."""
    response = result.get("response")
    return result.get("error") is None and isinstance(response, dict) and response.get("status_code") == 200
