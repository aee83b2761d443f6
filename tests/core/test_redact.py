"""No secret ever survives. Which names and options count as secret is a table in ``tests/web``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from bullpen.core import redact

MARK = "S3CR3T"
"""Part of every secret here, and of nothing else."""

TAIL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0*"), max_size=12)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0-="), min_size=1, max_size=12)


@dataclass(frozen=True)
class Piece:
    """Some words of a command line, and what must be left of them."""

    words: tuple[str, ...]
    shown: tuple[str, ...]


def option(name: str, secrets: list[str], inline: bool) -> Piece:
    values = [MARK + secret for secret in secrets]
    if inline:
        return Piece((f"{name}={values[0]}",), (f"{name}={redact.HIDDEN}",))
    return Piece((name, *values), (name, *[redact.HIDDEN] * len(values)))


PIECES = st.one_of(
    st.builds(
        option,
        st.sampled_from(["--api-key", "--api_key", "--api-k"]),
        st.lists(TAIL, min_size=1, max_size=3),
        st.booleans(),
    ),
    st.builds(
        option,
        st.sampled_from(["--hf-token", "--hf_token", "--hf-t"]),
        st.lists(TAIL, min_size=1, max_size=1),
        st.booleans(),
    ),
    st.builds(lambda value: Piece(("--model", value), ("--model", value)), PLAIN),
    st.builds(lambda value: Piece((f"--port={value}",), (f"--port={value}",)), PLAIN),
)


@given(st.lists(PIECES, max_size=6))
def test_options_show_everything_but_secrets(pieces: list[Piece]) -> None:
    argv = [word for piece in pieces for word in piece.words]
    shown = redact.options(shlex.join(argv), argv)
    assert MARK not in shown
    assert shlex.split(shown) == [word for piece in pieces for word in piece.shown]


@given(st.text(max_size=40), st.lists(PLAIN, max_size=4))
def test_options_without_secrets_come_back_as_given(text: str, argv: list[str]) -> None:
    assert redact.options(text, argv) == text


@given(st.lists(PIECES, min_size=1, max_size=4), st.lists(st.one_of(PLAIN, st.integers(0, 11)), max_size=6))
def test_sentence_may_quote_any_word_in_any_way(pieces: list[Piece], parts: list[str | int]) -> None:
    argv = [word for piece in pieces for word in piece.words]
    quoted = [part if isinstance(part, str) else argv[part % len(argv)] for part in parts]
    for text in ("".join(quoted), " ".join(quoted), repr(quoted), f"invalid choice: {quoted!r} (choose from a, b)"):
        assert MARK not in redact.sentence(text, argv)


def test_secret_that_holds_another_one() -> None:
    argv = ["--api-key", "S3CR3T", "--hf-token", "S3CR3T-and-more"]
    assert redact.sentence("refused: S3CR3T-and-more, S3CR3T", argv) == "refused: ***, ***"


@given(st.text("abcXYZ019", min_size=8, max_size=40))
def test_token_is_known_by_its_look(rest: str) -> None:
    assert rest not in redact.sentence(f"cannot read with hf_{rest}", [])


@given(st.dictionaries(st.sampled_from(["HF_TOKEN", "OPENAI_API_KEY", "PGPASSWORD", "HOME", "HF_HOME"]), PLAIN))
def test_environment_keeps_every_name(variables: dict[str, str]) -> None:
    shown = redact.environment(variables)
    assert set(shown) == set(variables)
    for name, value in shown.items():
        assert value == (variables[name] if name in ("HOME", "HF_HOME") else redact.HIDDEN)
