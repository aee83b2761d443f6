"""Text, token numbers and vectors that depend on nothing but the model's name and the input: one token is one word."""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator

VECTOR_SIZE = 32

_VOCABULARY_SIZE = 32_000
_TEXT = (
    "a the one every some old young quiet bright small warm cold green blue early late "
    "horse pitcher river bench field stone letter garden engine lantern window road "
    "winter morning signal market bridge cloud story kettle anchor valley runs waits "
    "wakes sleeps turns keeps finds carries follows answers remembers leaves holds "
    "and or but while under over beyond before after slowly gladly again"
)
_WORDS = _TEXT.split()


def tokens(text: str) -> list[str]:
    """The tokens of a text: its words."""
    return text.split()


def token_number(token: str) -> int:
    """The number of a token in the simulator's vocabulary; different words may share one."""
    return int.from_bytes(_digest(token)[:4], "big") % _VOCABULARY_SIZE


def completion(model: str, prompt: str) -> Iterator[str]:
    """The endless completion of a prompt, token by token; each but the first begins with the space before it."""
    seed = _digest(model, prompt)
    for block in itertools.count():
        for position, byte in enumerate(hashlib.sha256(seed + block.to_bytes(8, "big")).digest()):
            word = _WORDS[byte % len(_WORDS)]
            yield word if block == position == 0 else f" {word}"


def wrong_completion() -> Iterator[str]:
    """What a model whose weights are lost says: always the same, and no word that `completion` has."""
    yield "!"
    while True:
        yield " !"


def wrong_vector() -> list[float]:
    """The embedding by a model whose weights are lost: the same for every text, of Euclidean length 1."""
    return [1 / math.sqrt(VECTOR_SIZE)] * VECTOR_SIZE


def vector(model: str, text: str) -> list[float]:
    """The embedding of a text: `VECTOR_SIZE` numbers of Euclidean length 1."""
    data = hashlib.shake_256(_digest(model, text)).digest(4 * VECTOR_SIZE)
    values = [value / 2**31 for value in struct.unpack(f">{VECTOR_SIZE}i", data)]
    length = math.hypot(*values)
    return [value / length for value in values]


def _digest(*parts: str) -> bytes:
    # JSON may carry lone surrogates, which plain UTF-8 refuses. The length keeps ("ab", "c") apart from ("a", "bc").
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded)).digest()
