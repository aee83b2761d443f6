"""What must never come back: values of options and variables that hold secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"API_?KEY|(?:ACCESS|PRIVATE|SECRET|SIGNING|ENCRYPTION)_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTHORIZATION"
    r"|(?:TOKEN|(?:API|ACCESS|AUTH)_TOKENS|_PWD|(?:^|_)(?:KEYS?|PASS|AUTH))(?:_?\d+)?$",
    re.IGNORECASE,
)
"""Variables whose values are hidden; ``TOKENIZERS_PARALLELISM``, ``…_MAX_TOKENS`` and ``OLDPWD`` are none."""
MANY = 1_000_000
SECRET_OPTIONS = {"--api-key": MANY, "--hf-token": 1, "--watermark-config": 1}
"""Options of vLLM with secret values, and how many values each takes at most."""
SHORTEST = len("--a")
"""An option may be abbreviated; no shorter beginning of one of these is unambiguous."""


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables with the values of those that look like secrets hidden."""
    return {name: HIDDEN if SECRET_NAME.search(name) else value for name, value in variables.items()}


def options(text: str, argv: Sequence[str]) -> str:
    """The options as given, secret values hidden; quoted anew only where there is something to hide."""
    places = _secret_places(argv)
    if not places:
        return text
    return " ".join(places[place] + HIDDEN if place in places else shlex.quote(word) for place, word in enumerate(argv))


def sentence(text: str, argv: Sequence[str]) -> str:
    """A parser's sentence about ``argv`` without the secrets that it may quote, plain or as Python shows text."""
    secrets = {argv[place][len(before) :] for place, before in _secret_places(argv).items()} - {""}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN).replace(repr(secret)[1:-1], HIDDEN)
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", HIDDEN, text)


def _secret_places(argv: Sequence[str]) -> dict[int, str]:
    """The places of the words that are secrets or end in one, and what stands before it in the word."""
    places = {}
    option, awaited = 0, 0
    for place, word in enumerate(argv):
        # A word that begins with one dash may be a secret, where it comes first; after that it is an option.
        if awaited and not word.startswith("--" if place == option + 1 else "-"):
            places[place] = ""
            awaited -= 1
            continue
        name, equals, _ = word.partition("=")
        option, awaited = place, _secret_values(name)
        if awaited and equals:
            places[place] = name + equals
            awaited = 0
    return places


def _secret_values(name: str) -> int:
    """How many secret values a flag takes at most."""
    flag = name.partition(".")[0].replace("_", "-")
    if len(flag) < SHORTEST:
        return 0
    return max((most for option, most in SECRET_OPTIONS.items() if option.startswith(flag)), default=0)
