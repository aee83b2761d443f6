"""Ask a server something, and compare what it answers."""

from __future__ import annotations

import json

import httpx

from bullpen.engines.sleeping import CANARY_PROMPT, canary, canary_answer, same_answer
from bullpen.errors import BullpenError

ANSWER_SECONDS = 300.0
TOKENS = 16

__all__ = ["AskError", "Server", "same_answer"]


class AskError(BullpenError):
    """A server does not answer, or not what it was asked."""


class Server:
    """A server that is asked the same thing each time: to go on with a text, or, if it only embeds, to embed it.

    Args:
        url: where it answers.
        model: what it calls its model.
        api_key: what it wants to be asked with.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self._url = url
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._embeds = False

    def ask(self) -> str:
        """Ask it, and return what it answers, for `same_answer`.

        Raises:
            AskError: there is no such answer.
        """
        if not self._embeds:
            response = self._post("/v1/completions", completion(self._model))
            if response.status_code not in (400, 404, 405, 501):
                return self._read(response)
            self._embeds = True
        call = canary(self._model, pooling=True)
        return self._read(self._post(call.path, call.body or b""))

    def _post(self, path: str, body: bytes) -> httpx.Response:
        try:
            # No proxy is a way to a server on this host.
            with httpx.Client(trust_env=False, timeout=ANSWER_SECONDS) as http:
                return http.post(f"{self._url}{path}", content=body, headers=self._headers)
        except httpx.HTTPError as problem:
            raise AskError(f"{self._url}{path} does not answer: {problem or type(problem).__name__}") from problem

    def _read(self, response: httpx.Response) -> str:
        if response.status_code != 200:
            path, said = response.request.url.path, response.text[:200]
            raise AskError(f"{path} is answered with HTTP {response.status_code}: {said}")
        try:
            return canary_answer(self._embeds, response.content)
        except ValueError as problem:
            raise AskError(str(problem)) from problem


def completion(model: str) -> bytes:
    """The body of the question: a few tokens, always the most likely ones."""
    question = {"prompt": CANARY_PROMPT, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    return json.dumps({"model": model, **question}).encode()
