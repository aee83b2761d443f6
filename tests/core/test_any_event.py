"""Events in any order, from a world that keeps no rule: the fleet never raises and never contradicts itself."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Depth, Ladder, Memory, State, WarmUp
from bullpen.core.roster import Limits
from bullpen.errors import LaunchError
from tests.core.scenario import CRASH, DEVICES, GPUS, config, served

IDS = st.sampled_from("ab")
PORTS = st.sampled_from([None, 0, 8000, 8001])
CONFIGS = st.builds(
    config,
    st.sampled_from([None, GPUS[:1], GPUS]),
    sleep=st.sampled_from([None, "engine", "emulate"]),
    ladder=st.sampled_from([Ladder(), Ladder(sleep_after=1.0, stop_after=5.0), Ladder(pin=True)]),
    warm_up=st.sampled_from([None, WarmUp("/v1/completions", "{}")]),
)
NUMBERS = st.integers(1, 6)
DEPTHS = st.sampled_from([None, Depth.LEVEL_1, Depth.LEVEL_2])
STARTS = [
    st.builds(ev.Create, st.just(0), IDS, st.just("key"), CONFIGS, st.booleans()),
    st.builds(ev.Checked, IDS, st.builds(served, PORTS), st.just(100), st.just(7), st.just("fork")),
    st.builds(ev.PortReady, IDS, st.sampled_from([8000, 8001])),
    st.builds(ev.Refused, IDS, st.just(LaunchError("no"))),
    st.builds(ev.Started, IDS),
    st.builds(ev.PhaseSeen, IDS, st.sampled_from(["weights", "bind"]), st.floats(0, 1)),
    st.builds(ev.Answered, IDS),
    st.builds(ev.WarmedUp, IDS, st.just(1), st.sampled_from([None, "no"])),
    st.builds(ev.Measured, IDS, st.just(1), st.sampled_from(Depth), st.just(Memory(40_000, 30_000))),
]
ENDS = [
    st.builds(ev.Exited, IDS, st.sampled_from([0, 1, -9, None]), st.just(CRASH)),
    st.builds(ev.TreeGone, IDS),
    st.builds(ev.TreeStuck, IDS, st.just("100 (python, state D)")),
    st.builds(ev.Stop, st.just(0), IDS, st.sampled_from([0.0, 10.0]), st.booleans()),
    st.builds(ev.TimerFired, IDS, st.sampled_from(["start", "stop", "operation", "idle"])),
]
SLEEPS = [
    st.builds(ev.Sleep, st.just(0), IDS, DEPTHS, st.just(5.0), st.booleans()),
    st.builds(ev.Wake, st.just(0), IDS),
    st.builds(
        ev.Swap, st.just(0), IDS, st.none() | st.lists(IDS, max_size=2).map(tuple), DEPTHS, st.just(5.0), st.just(False)
    ),
    st.builds(ev.Judge, st.just(0), IDS, st.sampled_from([Depth.LEVEL_1, Depth.LEVEL_2]), st.booleans(), st.just("no")),
    st.builds(ev.Drained, IDS, NUMBERS, st.integers(0, 2)),
    st.builds(ev.Slept, IDS, NUMBERS, st.sampled_from([None, "one"])),
    st.builds(ev.Woken, IDS, NUMBERS),
    st.builds(ev.EngineFailed, IDS, NUMBERS, st.just("no"), st.booleans(), st.booleans()),
    st.builds(ev.MemoryFree, IDS, NUMBERS, st.sampled_from([{}, {"GPU-0": 80_000}])),
    st.builds(ev.MemoryShort, IDS, NUMBERS, st.just("it is full")),
    st.builds(ev.Activity, IDS, st.sampled_from([None, 0, 1]), st.sampled_from([0.0, 100.0])),
    st.builds(ev.Inspected, IDS, NUMBERS, st.sampled_from([None, True, False])),
]
EVENTS = st.one_of(*STARTS, *ENDS, *SLEEPS)
OF_ONE_THAT_IS_THERE = fx.KillTree | fx.Terminate | fx.Watch | fx.Start | fx.Drain | fx.PutToSleep | fx.WakeUp


@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=60))
def test_no_event_can_upset_the_fleet(events: list[ev.Event]) -> None:
    fleet = Fleet(gpus=DEVICES, limits=Limits(host_mib=50_000))
    unanswered: set[int] = set()
    for number, event in enumerate(events, start=1):
        if isinstance(event, ev.Create):
            event = replace(event, key=f"key-{number}")
        if isinstance(event, ev.Request):
            event = replace(event, request=number)
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
            if isinstance(effect, OF_ONE_THAT_IS_THERE):
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
    fleet = Fleet(gpus=DEVICES)
    fleet.handle(ev.Create(1, "other", "key", config()), 0.0)
    for event in events:
        if not isinstance(event, ev.Create | ev.Swap):
            assert all(isinstance(effect, fx.Reply) for effect in fleet.handle(event, 1.0))
    assert [instance.state for instance in fleet.instances.values()] == [State.STARTING]
