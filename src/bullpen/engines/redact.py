"""Secrets that an engine's log may hold, taken out before anything of it is quoted."""

import re

HIDDEN = "***"

_NAME = r"(?:token|secret|password|api[_-]?key|access[_-]?key)"
_QUOTED = r"'(?:[^'\\\n]|\\.)*+'?|\"(?:[^\"\\\n]|\\.)*+\"?"
_VALUE = rf"(?:\[[^\]\n]*+\]?|{_QUOTED}|[^\s,)}}\]]++)"
# Between an option and its value in a command line, or in the printed list of its words.
_BETWEEN = r"['\"]?(?:=|,?[ \t]++)"

# Each pattern takes time in proportion to the text: a repeat is bounded or never gives back what it took (`++`).
_SECRETS = (
    # A Hugging Face token, wherever it stands.
    (re.compile(r"hf_[A-Za-z0-9]{16,}+"), HIDDEN),
    # --api-key takes several values: every word up to the next option.
    (re.compile(rf"(--api[_-]key){_BETWEEN}\S++(?:[ \t]++(?!['\"]?-)\S++)*+", re.I), rf"\1 {HIDDEN}"),
    (
        re.compile(rf"(--[a-z0-9_-]{{0,40}}(?:token|secret|password|key)){_BETWEEN}(?:{_QUOTED}|\S++)", re.I),
        rf"\1 {HIDDEN}",
    ),
    # 'api_key': 'x' in a printed dictionary, api_key='x' in a printed object, HF_TOKEN=x in a shell's line.
    (re.compile(rf"(['\"]\w{{0,40}}{_NAME}['\"][ \t]*+:[ \t]*+){_VALUE}", re.I), rf"\1'{HIDDEN}'"),
    (re.compile(rf"((?<![A-Za-z0-9]){_NAME}=){_VALUE}", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"(\bBearer[ \t]++)[^\s'\"]++", re.I), rf"\1{HIDDEN}"),
    # https://user:password@host
    (re.compile(r"(://)[^/\s@]++@"), rf"\1{HIDDEN}@"),
)
_SECRET_OPTION = re.compile(r"--[a-z0-9_-]{0,40}(?:token|secret|password|key)(?![a-z0-9_-])", re.I)


def redact(text: str) -> str:
    """The text with tokens, keys and passwords replaced by `***`."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def is_secret_option(name: str) -> bool:
    """Whether the option that the text begins with, like `--api-key`, has a value that must not be shown."""
    return _SECRET_OPTION.match(name) is not None
