"""The book: who has an accelerator, whether another fits, and where a new one goes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.core.book import Book, Claim, Hold
from bullpen.core.devices import Gpu
from bullpen.errors import ConflictError

DEVICES = [Gpu(index, f"GPU-{index}", "H100", 80_000) for index in range(3)]
UUIDS = [gpu.uuid for gpu in DEVICES]
SHARES = st.sampled_from([None, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
CLAIMS = st.lists(
    st.builds(
        lambda gpus, **fields: Claim("?", tuple(sorted(gpus)), **fields),
        st.sets(st.sampled_from(UUIDS), min_size=1),
        hold=st.sampled_from(Hold),
        share=SHARES,
        mib=st.sampled_from([None, 0, 1_000, 30_000, 70_000]),
    ),
    max_size=5,
).map(lambda claims: [Claim(f"i{n}", one.gpus, one.hold, one.share, one.mib) for n, one in enumerate(claims)])


def has_room(claims: list[Claim], uuid: str, share: float | None, but: tuple[str, ...] = ()) -> bool:
    """Worked out in hundredths, the other way round."""
    there = [one for one in claims if uuid in one.gpus and one.hold is not Hold.ASLEEP and one.id not in but]
    wholes = [one for one in there if one.share is None]
    parts = sum(round((one.share or 0) * 10_000) for one in there)
    return not there if share is None else not wholes and parts + round(share * 10_000) <= 10_001


@given(CLAIMS, SHARES, st.sampled_from(UUIDS))
def test_rivals_are_there_exactly_where_there_is_no_room(claims: list[Claim], share: float | None, uuid: str) -> None:
    book = Book(DEVICES, claims)
    rivals = book.rivals(uuid, share)
    assert (rivals == []) is has_room(claims, uuid, share)
    assert all(uuid in one.gpus and one.hold is not Hold.ASLEEP for one in rivals)
    refusal = book.refusal([uuid], share)
    assert (refusal is None) is (rivals == [])
    assert refusal is None or (uuid in str(refusal) and f"'{rivals[0].id}'" in str(refusal))
    assert book.rivals(uuid, share, but=[one.id for one in claims]) == []


@given(CLAIMS, SHARES, st.integers(1, 4))
def test_place_takes_what_is_free_and_says_who_has_the_rest(
    claims: list[Claim], share: float | None, count: int
) -> None:
    free = [uuid for uuid in UUIDS if has_room(claims, uuid, share)]
    place = Book(DEVICES, claims).place(count, share)
    if isinstance(place, ConflictError):
        assert len(free) < count
        owners = {one.id for one in claims for uuid in one.gpus if uuid not in free and one.hold is not Hold.ASLEEP}
        assert count > len(DEVICES) or all(f"'{one}'" in str(place) for one in owners)
        return
    assert len(place) == len(set(place)) == count
    assert set(place) <= set(free)
    assert list(place) == sorted(place)
    chosen, left = set(place), set(free) - set(place)
    if share is None:
        sleepers = {uuid: sum(uuid in one.gpus for one in claims) for uuid in free}
        assert all(sleepers[one] <= sleepers[other] for one, other in itertools.product(chosen, left))
    else:
        awake = [one for one in claims if one.hold is not Hold.ASLEEP]
        full = {uuid: sum(one.share or 1.0 for one in awake if uuid in one.gpus) for uuid in free}
        assert all(full[one] >= full[other] for one, other in itertools.product(chosen, left))


@given(CLAIMS, st.sampled_from([None, 1, 30_000, 80_000, 90_000]), st.sampled_from(UUIDS))
def test_crowding_counts_sleepers_too(claims: list[Claim], mib: int | None, uuid: str) -> None:
    held = sum(one.mib or 0 for one in claims if uuid in one.gpus)
    crowded = Book(DEVICES, claims).crowding([uuid], mib)
    assert (crowded is not None) is (mib is not None and mib + held > 80_000)
    assert crowded is None or all(f"'{one.id}'" in str(crowded) for one in claims if uuid in one.gpus)
    assert mib is None or mib > 80_000 or Book(DEVICES, claims).crowding([uuid], mib, [c.id for c in claims]) is None


def test_three_thirds_are_a_whole() -> None:
    claims = [Claim(name, ("GPU-0",), Hold.AWAKE, share=1 / 3) for name in "ab"]
    assert Book(DEVICES, claims).refusal(["GPU-0"], 1 / 3) is None
    assert Book(DEVICES, claims).refusal(["GPU-0"], 0.34) is not None


@pytest.mark.parametrize(
    ("claim", "share", "words"),
    [
        (Claim("a", ("GPU-0",), Hold.AWAKE), None, "belongs to instance 'a'; delete that one, put it to sleep"),
        (Claim("a", ("GPU-0",), Hold.COMING), None, "belongs to instance 'a', which is on its way there"),
        (Claim("a", ("GPU-0",), Hold.AWAKE, share=0.75), 0.5, "has a share of 0.25 left, 0.5 is asked for; 'a'"),
        (Claim("a", ("GPU-0",), Hold.AWAKE, share=0.75), None, "belongs to instance 'a'"),
    ],
)
def test_refusal_says_what_to_do(claim: Claim, share: float | None, words: str) -> None:
    assert words in str(Book(DEVICES, [claim]).refusal(["GPU-0"], share))


def test_more_than_there_are() -> None:
    assert str(Book(DEVICES, []).place(4, None)) == "4 GPUs are asked for and this host has 3"


def test_several_are_never_parts_of_one() -> None:
    parts = [Gpu(3 + n, f"MIG-{n}", "H100 MIG", 10_000, parent="GPU-9") for n in range(2)]
    book = Book([DEVICES[0], *parts], [])
    assert isinstance(book.place(2, None), ConflictError), "CUDA shows a server one MIG device at most"
    assert Book(parts, []).place(1, None) == ("MIG-0",)
