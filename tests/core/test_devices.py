"""What a word and a value of ``CUDA_VISIBLE_DEVICES`` mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.core.devices import Gpu, resolve, select
from bullpen.errors import InvalidRequestError

PLAIN = [
    Gpu(0, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "A", 81920),
    Gpu(1, "GPU-8932aaaa-d72c-4106-c12f-20bd9faed9f6", "A", 81920),
    Gpu(2, "GPU-1b2c3d4e-d72c-4106-c12f-20bd9faed9f6", "A", 81920),
]
SLICES = [
    Gpu(3, "MIG-aaaa1111-d72c-4106-c12f-20bd9faed9f6", "A 1g.10gb", 9728, parent="GPU-77777777"),
    Gpu(4, "MIG-aaaa2222-d72c-4106-c12f-20bd9faed9f6", "A 1g.10gb", 9728, parent="GPU-77777777"),
]
ALL = [*PLAIN, *SLICES]


@st.composite
def hosts(draw: st.DrawFn) -> list[Gpu]:
    """GPUs with UUIDs of few letters, so that beginnings often fit several, and MIG devices after them."""
    letters = st.text("ab", min_size=6, max_size=8)
    uuids = draw(st.lists(letters, unique=True, max_size=6))
    slices = draw(st.lists(letters, unique=True, max_size=3))
    gpus = [Gpu(index, f"GPU-{uuid}", "mock", 1024) for index, uuid in enumerate(uuids)]
    return gpus + [Gpu(len(gpus) + place, f"MIG-{uuid}", "mock", 512, "GPU-x") for place, uuid in enumerate(slices)]


ENTRIES = st.one_of(
    st.integers(-1, 9).map(str),
    st.text("ab", max_size=8).map("GPU-{}".format),
    st.text("ab", max_size=8).map("MIG-{}".format),
    st.text(max_size=3),
)


@given(hosts(), st.lists(ENTRIES, max_size=5))
def test_every_entry_before_the_first_wrong_one_names_one_gpu(gpus: list[Gpu], entries: list[str]) -> None:
    left = select(gpus, ",".join(entries))
    assert len(set(left)) == len(left)
    entries = ",".join(entries).split(",")
    for gpu, entry in zip(left, entries, strict=False):
        word = entry.strip()
        assert gpu in gpus
        assert gpu.visible == str(int(word)) if word.isdigit() else gpu.uuid.startswith(word)
    if 0 < len(left) < len(entries):
        first, following = entries[0].strip(), entries[len(left)].strip()
        assert first.isdigit() != following.isdigit() or select(gpus, following) == []


@given(hosts(), st.data())
def test_what_visible_says_selects_the_same(gpus: list[Gpu], data: st.DataObject) -> None:
    """GPUs and MIG devices apart: CUDA takes no list that begins with an index and goes on with a UUID."""
    parts = data.draw(st.booleans())
    chosen = data.draw(st.permutations([gpu for gpu in gpus if (gpu.parent is not None) == parts]))
    assert select(gpus, ",".join(gpu.visible for gpu in chosen)) == chosen
    assert select(gpus, ",".join(gpu.uuid for gpu in chosen)) == chosen


@given(hosts())
def test_without_the_variable_all_are_left(gpus: list[Gpu]) -> None:
    assert select(gpus, None) == gpus


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [2, 0]),
        (" 2 , 0 ", [2, 0]),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,,1", [0]),
        ("0,0", []),
        ("3", []),
        ("1" * 5000, []),
        ("²", []),
        ("GPU-1b", [2]),
        ("GPU-8932", []),
        ("GPU-8932f,GPU-8932a", [0, 1]),
        ("GPU-8932f,GPU-8932f9", []),
        ("GPU-1b,MIG-aaaa2", [2, 4]),
        ("MIG-aaaa2222,MIG-aaaa1111", [4, 3]),
        ("0,GPU-1b", [0]),
        ("GPU-1b,0", [2]),
    ],
)
def test_a_value_leaves(visible: str, left: list[int]) -> None:
    assert [gpu.index for gpu in select(ALL, visible)] == left


def test_a_whole_uuid_is_never_ambiguous() -> None:
    gpus = [Gpu(index, f"GPU-{index}", "mock", 1024) for index in range(12)]
    assert select(gpus, "GPU-1,GPU-11") == [gpus[1], gpus[11]]
    assert resolve(gpus, "GPU-1") == gpus[1]


@given(hosts())
def test_each_gpu_goes_by_its_names(gpus: list[Gpu]) -> None:
    for gpu in gpus:
        assert resolve(gpus, gpu.uuid) == gpu
        assert resolve(gpus, str(gpu.index)) == gpu


@given(hosts(), ENTRIES)
def test_a_word_means_one_gpu_or_is_refused(gpus: list[Gpu], word: str) -> None:
    try:
        gpu = resolve(gpus, word)
    except InvalidRequestError as problem:
        assert problem.field == "gpu_uuids"
        assert "there are: " in str(problem)
        assert word not in {gpu.uuid for gpu in gpus}
    else:
        assert gpu in gpus
        others = [other for other in gpus if other.uuid.startswith(word)]
        assert word in {str(gpu.index), gpu.uuid} or (len(word) >= 8 and others == [gpu])


@pytest.mark.parametrize(("word", "index"), [("GPU-1b2c", 2), ("MIG-aaaa2", 4), ("4", 4), ("GPU-8932f", 0)])
def test_a_word_means(word: str, index: int) -> None:
    assert resolve(ALL, word).index == index


@pytest.mark.parametrize("word", ["", "9", "GPU-", "GPU-1b", "MIG-aaaa9", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6x"])
def test_a_word_that_means_none(word: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(ALL, word)
    assert str(caught.value).startswith(f"no GPU '{word}' on this host; there are: {PLAIN[0].uuid} (index 0), ")
    assert all(gpu.uuid in str(caught.value) for gpu in ALL)


def test_a_word_that_means_two() -> None:
    with pytest.raises(InvalidRequestError, match=r"more than one GPU on this host begins with 'GPU-8932'") as caught:
        resolve(ALL, "GPU-8932")
    assert PLAIN[1].uuid in str(caught.value)
    assert PLAIN[2].uuid not in str(caught.value)


def test_where_there_are_none() -> None:
    with pytest.raises(InvalidRequestError, match=r"no GPU '0' on this host; there are: none"):
        resolve([], "0")
