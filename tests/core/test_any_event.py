"""Events in any order, from a world that keeps no rule: the fleet never raises and never contradicts itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import State
from bullpen.errors import LaunchError
from tests.core.scenario import CRASH, GPUS, config, served

IDS = st.sampled_from("ab")
PORTS = st.sampled_from([None, 0, 8000, 8001])
EVENTS = st.one_of(
    st.builds(ev.Create, st.just(0), IDS, st.just("key"), st.builds(config, st.sampled_from([None, GPUS[:1], GPUS]))),
    st.builds(ev.Checked, IDS, st.builds(served, PORTS), st.just(100), st.just(7), st.just("fork")),
    st.builds(ev.PortReady, IDS, st.sampled_from([8000, 8001])),
    st.builds(ev.Refused, IDS, st.just(LaunchError("no"))),
    st.builds(ev.Started, IDS),
    st.builds(ev.PhaseSeen, IDS, st.sampled_from(["weights", "bind"]), st.floats(0, 1)),
    st.builds(ev.Answered, IDS),
    st.builds(ev.Exited, IDS, st.sampled_from([0, 1, -9, None]), st.just(CRASH)),
    st.builds(ev.TreeGone, IDS),
    st.builds(ev.TreeStuck, IDS, st.just("100 (python, state D)")),
    st.builds(ev.Stop, st.just(0), IDS, st.sampled_from([0.0, 10.0])),
    st.builds(ev.TimerFired, IDS, st.sampled_from(["start", "stop"])),
)


@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=60))
def test_no_event_can_upset_the_fleet(events: list[ev.Event]) -> None:
    fleet = Fleet(gpus=GPUS)
    unanswered: set[int] = set()
    for number, event in enumerate(events):
        if isinstance(event, ev.Create):
            event = ev.Create(number, event.id, f"key-{number}", event.config)
        elif isinstance(event, ev.Stop):
            event = ev.Stop(number, event.id, event.timeout)
        if isinstance(event, ev.Create | ev.Stop):
            unanswered.add(number)
        revision = fleet.revision
        effects = fleet.handle(event, float(number))
        published = [effect for effect in effects if isinstance(effect, fx.Publish)]
        assert fleet.revision == revision + len(published)
        for effect in effects:
            if isinstance(effect, fx.Reply):
                unanswered.remove(effect.request)
            if isinstance(effect, fx.Publish | fx.PublishState):
                assert effect.instance.listed
            if isinstance(effect, fx.Save | fx.KillTree | fx.Terminate | fx.SetTimer | fx.Watch | fx.Start):
                assert effect.id in fleet.instances
            if isinstance(effect, fx.Forget | fx.Discard):
                assert effect.id not in fleet.instances

    # Whoever still waits is answered when everything comes to an end.
    for instance_id in list(fleet.instances):
        endings: list[ev.Event] = [
            ev.Refused(instance_id, LaunchError("ending")),
            ev.Stop(-1, instance_id, 0.0),
            ev.TimerFired(instance_id, "stop"),
            ev.TreeGone(instance_id),
        ]
        for event in endings:
            for effect in fleet.handle(event, 0.0):
                if isinstance(effect, fx.Reply):
                    unanswered.discard(effect.request)
    assert unanswered == set()
    assert fleet.instances == {}


@given(st.lists(EVENTS, max_size=20))
def test_events_for_others_change_nothing(events: list[ev.Event]) -> None:
    fleet = Fleet(gpus=GPUS)
    fleet.handle(ev.Create(1, "other", "key", config()), 0.0)
    for event in events:
        if not isinstance(event, ev.Create):
            assert all(isinstance(effect, fx.Reply) for effect in fleet.handle(event, 1.0))
    assert [instance.state for instance in fleet.instances.values()] == [State.STARTING]
