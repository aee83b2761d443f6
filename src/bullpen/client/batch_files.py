"""The two files of a batch job, in the format of OpenAI's batch API: requests in, results out.

The file of results is the journal too. It has one line for each request, in the order of the requests, so what is left
to do is what comes after as many requests as it has lines.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from bullpen.errors import ConflictError, InvalidRequestError

FIELDS: Mapping[str, type] = {"custom_id": str, "method": str, "url": str, "body": dict}


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input.

    Attributes:
        number: of the line, from 1.
        url: a path, such as ``/v1/chat/completions``.
    """

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


def read_requests(path: Path) -> Iterator[Request]:
    """The requests of an input file, one after the other; blank lines are none.

    Raises:
        InvalidRequestError: a line is no request, or the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield read_request(f"{path}, line {number}", number, line)
    except OSError as problem:
        raise InvalidRequestError(f"{path} cannot be read: {problem.strerror}", field="input") from problem


def read_request(where: str, number: int, line: bytes) -> Request:
    """Read one line.

    Raises:
        InvalidRequestError: it is no request.
    """
    document = read_line(where, line)
    for name, kind in FIELDS.items():
        if not isinstance(document.get(name), kind):
            needed = f"a request has {', '.join(FIELDS)}, the last an object and the others texts"
            raise InvalidRequestError(f"{where}: {name!r} is missing or of the wrong kind; {needed}", field=name)
    if document["method"] != "POST":
        raise InvalidRequestError(f"{where}: the method of a request is POST", field="method")
    if not document["url"].startswith("/"):
        raise InvalidRequestError(f"{where}: url is a path, such as /v1/chat/completions", field="url")
    if document["body"].get("stream"):
        raise InvalidRequestError(f"{where}: a batch has whole answers; leave 'stream' out of the body", field="body")
    return Request(number, document["custom_id"], document["url"], document["body"])


def read_line(where: str, line: bytes) -> Mapping[str, Any]:
    """The JSON object of a line.

    Raises:
        InvalidRequestError: it has none.
    """
    try:
        document = json.loads(line)
    except ValueError as problem:
        raise InvalidRequestError(f"{where}: this is no JSON: {problem}", field="input") from problem
    if not isinstance(document, dict):
        raise InvalidRequestError(f"{where}: this is no JSON object", field="input")
    return document


def count_requests(path: Path) -> int:
    """How many requests an input file has; every line is checked.

    Raises:
        InvalidRequestError: a line is no request, or an id occurs twice.
    """
    seen: dict[str, int] = {}
    for request in read_requests(path):
        first = seen.setdefault(request.custom_id, request.number)
        if first != request.number:
            both = f"lines {first} and {request.number}"
            raise InvalidRequestError(f"{path}: {both} have the same custom_id {request.custom_id!r}", field="input")
    return len(seen)


class Results:
    """The file of results, open for one job at a time; a context manager.

    Attributes:
        done: results that it has.
        failed: how many of them are no success.

    Raises:
        ConflictError: another job has it.
        InvalidRequestError: it is something else than the results of this input.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
        except OSError as problem:
            raise InvalidRequestError(f"{path} cannot be written: {problem.strerror}", field="output") from problem
        self.done = self.failed = 0
        try:
            self._lock()
            os.truncate(self._descriptor, self._read(source))
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConflictError(f"another job is writing {self._path}; wait for it, or name another file") from None

    def _read(self, source: Path) -> int:
        """Count the lines that are there; the number of bytes up to the end of the last whole one."""
        requests, size = read_requests(source), 0
        with self._path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):  # the writer was killed in the middle of it
                    break
                result = read_line(f"{self._path}, line {self.done + 1}", line)
                request = next(requests, None)
                if request is None or result.get("custom_id") != request.custom_id:
                    raise InvalidRequestError(
                        f"{self._path}, line {self.done + 1} is no result of {source}: its custom_id is"
                        f" {result.get('custom_id')!r}; remove that file, or name another one",
                        field="output",
                    )
                self.done += 1
                self.failed += not is_success(result)
                size += len(line)
        return size

    def write(self, results: Sequence[Result]) -> None:
        """Append results."""
        view = memoryview(b"".join(result.line for result in results))
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.done += len(results)
        self.failed += sum(not result.is_success for result in results)

    def sync(self) -> None:
        """Force what was written onto the disk."""
        os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the output, and whether it is a success."""

    line: bytes
    is_success: bool


def answered(request: Request, response: httpx.Response) -> Result:
    """The result of a request that was answered, whatever the status."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    number = response.headers.get("x-request-id") or (body.get("id") if isinstance(body, dict) else None)
    answer = {"status_code": response.status_code, "request_id": number or "", "body": body}
    return new_result(request, answer, None)


def failed(request: Request, code: str, message: str) -> Result:
    """The result of a request that has no answer."""
    return new_result(request, None, {"code": code, "message": message})


def new_result(request: Request, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> Result:
    """A result as the format has it."""
    number = f"batch_req_{uuid.uuid4().hex}"
    document = {"id": number, "custom_id": request.custom_id, "response": response, "error": error}
    return Result(json.dumps(document).encode() + b"\n", is_success(document))


def is_success(result: Mapping[str, Any]) -> bool:
    """Whether a result is an answer with status 200."""
    return result.get("error") is None and (result.get("response") or {}).get("status_code") == 200
