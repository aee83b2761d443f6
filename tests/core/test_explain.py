"""Why an instance is as it is, in words."""

from __future__ import annotations

from bullpen.core.explain import explain
from bullpen.core.instance import Ladder, State
from tests.core.scenario import GPUS, Scenario


def told(scene: Scenario, instance_id: str = "a") -> dict[str, object]:
    return explain(scene.fleet.roster, scene.instance(instance_id), scene.now)


def test_sleeper_says_why_it_sleeps() -> None:
    scene = Scenario()
    scene.asleep()
    document = told(scene)
    assert document["state"] == "sleeping"
    assert str(document["summary"]).startswith("It is sleeping at level 1")
    notes = document["notes"]
    assert isinstance(notes, list)
    assert any("goes to sleep (level 1): asked to" in note["text"] for note in notes)
    assert document["next_step"] is None


def test_one_that_waits_names_whom_it_waits_for() -> None:
    scene = Scenario()
    scene.asleep("b")
    scene.ready("a")
    scene.swap("b", ("a",))
    document = told(scene, "b")
    assert "for 'a' to sleep" in str(document["waits_for"])
    assert "swapped in" in str(document["summary"])


def test_what_was_refused_stands_in_the_notes() -> None:
    scene = Scenario()
    scene.asleep("b")
    scene.ready("a")
    scene.wake("b")
    assert "belongs to instance 'a'" in scene.notes("b")[-1]
    assert "fell asleep" in str(told(scene, "b")["summary"]), "what was not done is not why it is as it is"


def test_next_step_counts_from_the_last_request() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=Ladder(sleep_after=30.0))
    scene.now += 10
    assert told(scene)["next_step"] == {
        "to": "level_1",
        "in_seconds": 20.0,
        "why": "unless a request comes: 30 s without one",
    }


def test_verdicts_say_what_was_seen() -> None:
    scene = Scenario()
    scene.asleep()
    scene.wake()
    scene.memory_free()
    scene.engine_failed("it does not answer as before its sleep")
    works = told(scene)["works"]
    assert isinstance(works, dict)
    assert works["level_1"]["works"] is False
    assert "as before its sleep" in works["level_1"]["why"]
    assert works["level_2"] is None


def test_end_is_told_with_its_reason() -> None:
    scene = Scenario()
    scene.reach(State.FAILED)
    assert told(scene)["summary"] == "It is failed: it fell over"
