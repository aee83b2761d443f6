"""The journal: what was saved comes back as it was; what cannot be kept is said so."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.core.instance import Address, Config, Depth, Instance, Ladder, Memory, Note, Served, State, WarmUp
from bullpen.core.profile import Profile, Verdict
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import StateError
from bullpen.node import journal as journal_module
from bullpen.node.journal import KEPT_EVENTS, SCHEMA_VERSION, TRIM_EVERY, Journal

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.floats(0, 4e9)
TEXTS = st.dictionaries(TEXT, TEXT, max_size=3)
WORDS = st.lists(TEXT, max_size=4).map(tuple)
TIMES = st.none() | NUMBERS
CONFIGS = st.builds(
    Config,
    TEXT,
    WORDS,
    st.none() | TEXTS,
    st.none() | WORDS,
    st.none() | TEXTS,
    st.sampled_from(["vllm", "sim"]),
    TEXT,
    gpus=st.none() | st.integers(1, 8),
    gpu_share=st.none() | st.floats(0.01, 1),
    sleep=st.sampled_from([None, "engine", "emulate", "off"]),
    ladder=st.builds(Ladder, TIMES, TIMES, TIMES, st.booleans(), st.integers(-9, 9)),
    warm_up=st.none() | st.builds(WarmUp, TEXT, TEXT),
)
SERVED = st.builds(
    Served,
    TEXT,
    WORDS,
    st.none() | st.integers(0, 65535),
    st.none() | TEXT,
    st.none() | TEXT,
    st.booleans(),
    version=TEXT,
    cannot_sleep=st.none() | TEXT,
    utilization=st.none() | st.floats(0, 1),
    weights_mib=st.none() | st.integers(0, 2**30),
)
MEMORY = st.builds(Memory, st.none() | st.integers(0, 2**30), st.none() | st.integers(0, 2**30))
DEPTHS = st.sampled_from([int(depth) for depth in Depth])
PROFILES = st.builds(
    Profile,
    memory=st.dictionaries(DEPTHS, MEMORY, max_size=3),
    phases=st.dictionaries(TEXT, NUMBERS, max_size=3),
    verdicts=st.dictionaries(DEPTHS, st.builds(Verdict, st.booleans(), TEXT, NUMBERS), max_size=3),
)
ADDRESSES = st.builds(Address, TEXT, st.none() | st.integers(0, 65535), st.none() | TEXT, st.booleans())
INSTANCES = st.builds(
    Instance,
    id=TEXT,
    key=TEXT,
    config=CONFIGS,
    created_at=NUMBERS,
    state=st.sampled_from(State),
    served=st.none() | SERVED,
    address=st.none() | ADDRESSES,
    pid=st.none() | st.integers(1, 2**22),
    start_ticks=st.none() | st.integers(0, 2**62),
    phase=st.none() | TEXT,
    progress=st.floats(0, 1),
    phase_started=st.dictionaries(TEXT, NUMBERS, max_size=3),
    how=st.none() | TEXT,
    revision=st.integers(0, 2**62),
    ready_at=st.none() | NUMBERS,
    ended_at=st.none() | NUMBERS,
    exit_code=st.none() | st.integers(-64, 255),
    attempt=st.integers(1, 99),
    expected_ready_at=st.none() | NUMBERS,
    gpus=WORDS,
    can_sleep=st.booleans(),
    depth=st.sampled_from(Depth),
    heading=st.none() | st.sampled_from(Depth),
    canary=st.none() | TEXT,
    memory=st.dictionaries(st.sampled_from([int(depth) for depth in Depth]), MEMORY, max_size=3),
    last_used=st.none() | NUMBERS,
    notes=st.lists(st.builds(Note, NUMBERS, TEXT), max_size=3),
    error=st.none() | st.builds(Failure, st.sampled_from(CrashClass), TEXT),
    tree_gone=st.booleans(),
    listed=st.booleans(),
)


def instance(name: str, created_at: float = 1.0, options: str = "--model m") -> Instance:
    return Instance(name, f"key-{name}", Config(options, ("--model", "m")), created_at=created_at)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


@settings(max_examples=25, deadline=None)
@given(saved=st.lists(INSTANCES, max_size=3, unique_by=lambda one: one.id))
def test_instances_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, saved: list[Instance]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    for one in saved:
        journal.save(one)
    journal.close()
    again = Journal(path)
    assert sorted(again.instances(), key=lambda one: one.id) == sorted(saved, key=lambda one: one.id)
    assert [one.created_at for one in again.instances()] == sorted(one.created_at for one in saved)
    again.close()


def test_a_change_replaces_and_forgetting_removes(journal: Journal) -> None:
    one = instance("a")
    journal.save(one)
    one.state, one.exit_code = State.FAILED, -9
    journal.save(one)
    journal.save(instance("b", 2.0))
    assert [(saved.id, saved.exit_code) for saved in journal.instances()] == [("a", -9), ("b", None)]
    journal.forget("a")
    journal.forget("never there")
    assert [saved.id for saved in journal.instances()] == ["b"]


def test_it_survives_the_end_of_its_process_at_any_moment(tmp_path: Path) -> None:
    """What a statement has written is there, though nobody closed the file."""
    first = Journal(tmp_path / "j")
    first.save(instance("a"))
    first.append_event(1, "one\n")
    for name in ("j", "j-wal"):
        (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
    again = Journal(tmp_path / "copy-j")
    assert [saved.id for saved in again.instances()] == ["a"]
    assert again.events() == [(1, "one\n")]
    again.close()
    first.close()


def test_it_is_its_owners_alone(tmp_path: Path) -> None:
    """It holds environments. What SQLite puts beside it is as private, whatever the umask."""
    before = os.umask(0)
    try:
        journal = Journal(tmp_path / "j")
        journal.save(instance("a"))
        files = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(files) == {"j", "j-wal", "j-shm"}
    assert set(files.values()) == {0o600}
    journal.close()


def test_events_are_kept_in_order_and_trimmed(journal: Journal) -> None:
    last = KEPT_EVENTS + 2 * TRIM_EVERY
    for revision in range(1, last + 1):
        journal.append_event(revision, f"{revision}\n")
    events = journal.events()
    assert events[-1] == (last, f"{last}\n")
    assert [revision for revision, _ in events] == list(range(events[0][0], last + 1))
    assert KEPT_EVENTS <= len(events) < KEPT_EVENTS + TRIM_EVERY


def test_facts(journal: Journal) -> None:
    assert journal.fact("boot") is None
    assert journal.fact("boot", "x") == "x"
    journal.set_fact("boot", {"a": [1, None]})
    assert journal.fact("boot") == {"a": [1, None]}


def test_a_checkpoint_keeps_the_log_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "CHECKPOINT_EVERY", 20)
    journal = Journal(tmp_path / "j")
    assert not journal.is_due()
    sizes = []
    for number in range(200):
        journal.save(instance("a", options="x" * 4000 + str(number)))
        if journal.is_due():
            journal.checkpoint()
            assert not journal.is_due()
        sizes.append((tmp_path / "j-wal").stat().st_size)
    assert max(sizes[100:]) <= max(sizes[:50]), "it does not grow without end"
    assert journal.instances()[0].config.options.endswith("199")
    journal.close()
    assert [file.name for file in tmp_path.iterdir()] == ["j"], "closing leaves one file"


def test_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = path.read_bytes()
    says = rf"is of version {SCHEMA_VERSION + 1}, this Bullpen reads {SCHEMA_VERSION}; move it away"
    with pytest.raises(StateError, match=says):
        Journal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all" * 200, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_file_is_said_to_be(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(StateError, match=r"the journal .*j is damaged: .*; move it away"):
        Journal(tmp_path / "j")


def test_an_instance_of_another_shape_is_said_to_be(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.save(instance("a"))
    journal.close()
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE instances SET data = '{\"id\": 1}'")
    db.close()
    journal = Journal(tmp_path / "j")
    with pytest.raises(StateError, match=r"holds an instance that this Bullpen cannot read .*; move it away"):
        journal.instances()
    journal.close()


@pytest.mark.parametrize("name", ["", "missing/j"])
def test_a_file_that_cannot_be_opened_is_said_to_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError, match=r"the journal .* cannot be used: .*; make room, or give another --state-dir"):
        Journal(tmp_path / name)


def test_a_full_disk(tmp_path: Path) -> None:
    """What does not fit is refused in one sentence; what was there stays, and with room again all goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        journal = Journal(disk / "j")
        journal.save(instance("kept"))
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"\0" * 4096)
        with pytest.raises(StateError, match=r"journal .* cannot be used: database or disk is full; make room"):
            for number in range(100):
                journal.save(instance(f"more {number}", options="x" * 4000))
        assert "kept" in [saved.id for saved in journal.instances()]
        filler.unlink()
        journal.save(instance("after"))
        journal.close()
        again = Journal(disk / "j")
        assert {"kept", "after"} <= {saved.id for saved in again.instances()}
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@given(profile=PROFILES)
@settings(max_examples=50, deadline=None)
def test_profiles_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    first = Journal(path)
    first.save_profile("vllm|0.32|m", Profile())
    first.save_profile("vllm|0.32|m", profile)
    first.close()
    assert Journal(path).profiles() == {"vllm|0.32|m": profile}


def test_a_profile_that_cannot_be_read_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.save_profile("good", Profile(phases={"ready": 1.0}))
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("INSERT INTO profiles VALUES ('odd', '{\"memory\": 7}')")
    assert list(journal.profiles()) == ["good"]
