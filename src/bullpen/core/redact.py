"""What must never come back: values of options and variables that hold secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(?:^|_)(?:\w*API_?KEYS?|ACCESS_?KEY\w*|PRIVATE_?KEY|KEY|TOKENS?|SECRETS?|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH)(?:_|$)",
    re.IGNORECASE,
)
"""Names of environment variables whose values are hidden; ``TOKENIZERS_PARALLELISM`` is none."""
SECRET_OPTIONS = ("--api-key", "--hf-token", "--ssl-keyfile-password")


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables with the values of those that look like secrets hidden."""
    return {name: HIDDEN if SECRET_NAME.search(name) else value for name, value in variables.items()}


def secrets_of(argv: Sequence[str]) -> set[str]:
    """The secret values in a command line."""
    return {argv[place].partition("=")[2] if inline else argv[place] for place, inline in _secret_places(argv)} - {""}


def options(text: str, argv: Sequence[str]) -> str:
    """The options as given, secret values hidden; quoted anew only where there is something to hide."""
    places = dict(_secret_places(argv))
    if not places:
        return text
    words = [
        word if place not in places else (word.partition("=")[0] + "=" + HIDDEN if places[place] else HIDDEN)
        for place, word in enumerate(argv)
    ]
    return " ".join(word if HIDDEN in word else shlex.quote(word) for word in words)


def sentence(text: str, argv: Sequence[str]) -> str:
    """A parser's sentence about ``argv`` without the secrets that it may quote."""
    for secret in secrets_of(argv):
        text = text.replace(secret, HIDDEN)
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", HIDDEN, text)


def _secret_places(argv: Sequence[str]) -> list[tuple[int, bool]]:
    """Where secret values stand: the place of the word, and whether it is part of ``--option=value``."""
    places = []
    inside = False
    for place, word in enumerate(argv):
        if not word.startswith("--"):
            if inside:
                places.append((place, False))
            continue
        name, equals, _ = word.partition("=")
        inside = is_secret_option(name)
        if inside and equals:
            places.append((place, True))
            inside = False
    return places


def is_secret_option(name: str) -> bool:
    """Whether a flag, or an unambiguous beginning of one, takes a secret."""
    flag = name.replace("_", "-")
    return len(flag) >= len("--hf-t") and any(option.startswith(flag) for option in SECRET_OPTIONS)
