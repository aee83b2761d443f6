"""The life of a create: check, port, save, start; and everything that may end it."""

from __future__ import annotations

from typing import Any

import pytest

from bullpen.core import effects as fx
from bullpen.core.instance import State
from bullpen.errors import ConflictError, InvalidRequestError, LaunchError, NotFoundError
from tests.core.scenario import GPUS, START_TIMEOUT, Scenario, kinds


def test_create_goes_through_check_port_save_and_start() -> None:
    scene = Scenario(revision=41)
    assert scene.create("a") == [fx.Check("a")]
    assert scene.checked("a", port=8000) == [fx.HoldPort("a", 8000, frozenset())]
    assert scene.port_ready("a", 8000) == [fx.Save("a"), fx.Start("a")]
    assert scene.unanswered() == [1]

    effects = scene.started("a")
    instance = scene.instance("a")
    assert effects == [
        fx.Save("a"),
        fx.Publish("CREATED", instance),
        fx.Watch("a"),
        fx.SetTimer("a", "start", START_TIMEOUT),
        fx.Reply(1, instance, "started"),
    ]
    assert (instance.revision, scene.fleet.revision) == (42, 42)
    assert (instance.pid, instance.start_ticks, instance.how) == (100, 7, "fork")
    assert instance.running
    assert instance.address is not None
    assert instance.address.url == "http://127.0.0.1:8000"


def test_nobody_sees_an_instance_before_its_process_has_become_the_server() -> None:
    scene = Scenario()
    for tell in (scene.create, scene.checked, scene.port_ready):
        tell("a")
        assert scene.fleet.listed() == []
        with pytest.raises(NotFoundError, match="'a'"):
            scene.fleet.get("a")
    scene.started("a")
    assert scene.fleet.listed() == [scene.fleet.get("a")]


def test_news_of_a_server_that_is_none_yet_are_of_an_earlier_one() -> None:
    scene = Scenario()
    for tell in (scene.create, scene.checked, scene.port_ready):
        tell("a")
        assert scene.phase("weights") == scene.answered() == scene.timer("start") == []
    assert scene.instance().state is State.STARTING


def test_list_is_oldest_first() -> None:
    scene = Scenario()
    scene.create("b")
    scene.reach(State.READY, "a")
    scene.checked("b")
    scene.port_ready("b")
    scene.started("b")
    assert [instance.id for instance in scene.fleet.listed()] == ["b", "a"]


@pytest.mark.parametrize("port", [None, 0])
def test_any_free_port_but_those_that_are_taken(port: int | None) -> None:
    scene = Scenario()
    scene.reach(State.READY, "other", port=8000)
    scene.create("a")
    assert scene.checked("a", port=port) == [fx.HoldPort("a", None, frozenset({8000}))]
    scene.port_ready("a", 20_005)
    address = scene.instance("a").address
    assert address is not None
    assert address.port == 20_005


def test_socket_needs_no_port() -> None:
    scene = Scenario()
    scene.create()
    assert kinds(scene.checked(uds="/run/m.sock", port=8000)) == ["Save", "Start"]
    assert scene.instance().address is not None
    assert scene.instance().address.url == "http+unix:///run/m.sock"  # type: ignore[union-attr]
    scene.create("b")
    assert scene.checked("b", port=8000) == [fx.HoldPort("b", 8000, frozenset())]


def test_options_name_the_host() -> None:
    scene = Scenario()
    scene.create()
    scene.checked(host="0.0.0.0", tls=True)
    scene.port_ready(port=9000)
    address = scene.instance().address
    assert address is not None
    assert (address.host, address.url) == ("0.0.0.0", "https://127.0.0.1:9000")


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_id_is_taken_whatever_its_owner_does(state: State) -> None:
    scene = Scenario()
    if state is State.SLEEPING:
        scene.reach(State.READY).enter(State.SLEEPING)
    else:
        scene.reach(state)
    assert kinds(scene.create("a")) == ["Reply"]
    assert isinstance(scene.error(), ConflictError)
    assert "exists already" in str(scene.error())


def test_id_is_taken_by_a_create_under_way() -> None:
    scene = Scenario()
    scene.create("a")
    assert kinds(scene.create("a")) == ["Reply"]
    assert isinstance(scene.error(), ConflictError)
    assert scene.unanswered() == [1]


def test_unknown_gpu_is_refused_with_those_that_exist() -> None:
    scene = Scenario()
    assert kinds(scene.create("a", gpus=["GPU-0", "GPU-9"])) == ["Reply"]
    error = scene.error()
    assert isinstance(error, InvalidRequestError)
    assert error.field == "gpu_uuids"
    assert "'GPU-9'" in str(error)
    assert "GPU-0 (index 0), GPU-1 (index 1)" in str(error)
    assert scene.fleet.instances == {}
    assert scene.owner("GPU-0") is None


def test_options_that_the_engine_refuses() -> None:
    scene = Scenario()
    scene.create("a", gpus=GPUS)
    problem = InvalidRequestError("--frobnicate is no option")
    assert scene.refused(problem) == [fx.Discard("a", "key-1"), fx.Reply(1, error=problem)]
    assert scene.fleet.instances == {}
    assert scene.published() == []
    assert scene.fleet.revision == 0
    assert kinds(scene.create("a", gpus=GPUS)) == ["Check"]


def test_port_of_another_instance_is_refused_and_the_owner_named() -> None:
    scene = Scenario()
    scene.reach(State.READY, "owner", port=8000)
    scene.create("a")
    assert kinds(scene.checked("a", port=8000)) == ["Discard", "Reply"]
    assert isinstance(scene.error(), ConflictError)
    assert "port 8000 belongs to instance 'owner'" in str(scene.error())


def test_two_creates_want_the_same_port_at_once() -> None:
    scene = Scenario()
    scene.create("a")
    scene.create("b")
    assert kinds(scene.checked("b", port=8000)) == ["HoldPort"]
    assert kinds(scene.checked("a", port=8000)) == ["Discard", "Reply"]
    assert "belongs to instance 'b'" in str(scene.error(1))
    assert scene.unanswered() == [2]


def test_port_that_could_not_be_held_is_free_for_the_next_one() -> None:
    scene = Scenario()
    scene.create("a")
    scene.checked("a", port=8000)
    taken = ConflictError("port 8000 is in use by another program")
    assert scene.refused(taken) == [fx.Discard("a", "key-1"), fx.Reply(1, error=taken)]
    scene.create("b")
    assert scene.checked("b", port=8000) == [fx.HoldPort("b", 8000, frozenset())]


@pytest.mark.parametrize("port", [-1, 65_536])
def test_number_that_is_no_port(port: int) -> None:
    scene = Scenario()
    scene.create()
    assert kinds(scene.checked(port=port)) == ["Discard", "Reply"]
    assert isinstance(scene.error(), InvalidRequestError)
    assert f"--port {port}" in str(scene.error())


# -- a create that is ended after the process was told to start -----------------------------------------------


def test_failed_start_is_answered_when_no_process_is_left() -> None:
    scene = Scenario()
    scene.create("a", gpus=["GPU-0"])
    scene.checked(port=8000)
    scene.port_ready(port=8000)
    problem = LaunchError("the process does not answer")
    assert scene.refused(problem) == [fx.KillTree("a")]
    assert scene.unanswered() == [1]
    assert scene.owner("GPU-0") == "a"
    assert kinds(scene.create("a")) == ["Reply"]

    assert kinds(scene.exited(-9)) == ["ClearTimers", "KillTree"]
    assert scene.tree_gone() == [fx.Forget("a", "key-1"), fx.Reply(1, error=problem)]
    assert scene.published() == []
    assert scene.owner("GPU-0") is None
    scene.create("a", gpus=["GPU-0"])
    assert scene.checked(port=8000) == [fx.HoldPort("a", 8000, frozenset())]


def test_failed_start_whose_processes_cannot_be_killed_becomes_visible() -> None:
    scene = Scenario()
    scene.create("a", gpus=["GPU-0"])
    scene.checked()
    scene.port_ready()
    problem = LaunchError("the process does not answer")
    scene.refused(problem)
    instance = scene.instance()
    assert scene.tree_stuck() == [
        fx.Save("a"),
        fx.Publish("CREATED", instance),
        fx.PublishState(instance),
        fx.Reply(1, error=problem),
    ]
    assert scene.fleet.get("a").state is State.FAILED
    assert scene.owner("GPU-0") == "a"

    assert scene.stop() == [fx.KillTree("a")]
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget", "Reply"]
    assert scene.owner("GPU-0") is None


def test_process_that_ends_before_it_has_become_the_server() -> None:
    scene = Scenario()
    scene.create()
    scene.checked()
    scene.port_ready()
    assert kinds(scene.exited(1)) == ["KillTree"]
    assert scene.started() == []
    assert kinds(scene.tree_gone()) == ["Forget", "Reply"]
    assert isinstance(scene.error(), LaunchError)
    assert scene.published() == []


@pytest.mark.parametrize("progress", ["check", "port", "start"])
def test_daemon_ends_while_a_create_is_under_way(progress: str) -> None:
    scene = Scenario()
    scene.create()
    if progress != "check":
        scene.checked()
    if progress == "start":
        scene.port_ready()
    ending = LaunchError("this daemon is ending")
    effects = scene.refused(ending)
    if progress == "start":
        assert effects == [fx.KillTree("a")]
        effects = scene.tree_gone()
    assert effects[-1] == fx.Reply(1, error=ending)
    assert scene.fleet.instances == {}
    # What was under way comes to something all the same, too late.
    assert scene.checked() == scene.port_ready() == scene.started() == scene.refused(LaunchError("late")) == []


@pytest.mark.parametrize("progress", ["check", "port", "start"])
def test_stop_ends_a_create_that_is_not_listed_yet(progress: str) -> None:
    scene = Scenario()
    scene.create("a", gpus=["GPU-0"])
    if progress != "check":
        scene.checked(port=8000)
    if progress == "start":
        scene.port_ready(port=8000)
    instance = scene.instance()
    effects = scene.stop()
    if progress == "start":
        assert effects == [fx.KillTree("a")]
        effects = scene.tree_gone()
    assert kinds(effects[:1]) == ["Forget" if progress == "start" else "Discard"]
    assert isinstance(scene.error(1), ConflictError)
    assert effects[-1] == fx.Reply(2, instance, "terminated")
    assert instance.state is State.STOPPED
    assert scene.published() == []
    assert kinds(scene.create("a", gpus=["GPU-0"])) == ["Check"]


def test_outcome_is_taken_once() -> None:
    scene = Scenario()
    scene.create()
    scene.checked()
    assert scene.checked() == []
    scene.port_ready()
    assert scene.port_ready() == scene.checked() == []
    scene.started()
    assert scene.started() == []
    assert scene.refused(LaunchError("late")) == []
    assert scene.fleet.revision == 1
    assert scene.unanswered() == []


# -- accelerators ----------------------------------------------------------------------------------------------


def test_gpu_belongs_to_one_from_the_request_on() -> None:
    scene = Scenario()
    scene.create("a", gpus=["GPU-0"])
    assert kinds(scene.create("b", gpus=["GPU-1", "GPU-0"])) == ["Reply"]
    assert isinstance(scene.error(), ConflictError)
    assert "GPU GPU-0 belongs to instance 'a'" in str(scene.error())
    assert scene.owner("GPU-1") is None
    assert kinds(scene.create("c", gpus=["GPU-1"])) == ["Check"]


def test_gpu_is_given_back_only_when_no_process_is_left() -> None:
    scene = Scenario()
    scene.reach(State.READY, "a", gpus=["GPU-0"])
    scene.exited(1)
    assert scene.instance().state is State.FAILED
    assert scene.owner("GPU-0") == "a"
    scene.tree_gone()
    assert scene.owner("GPU-0") is None
    assert kinds(scene.create("b", gpus=["GPU-0"])) == ["Check"]


def test_start_beside_sleepers_that_keep_too_much_names_them() -> None:
    scene = Scenario()
    scene.asleep("a")
    scene.measured(25_000, 1_000, "a")
    scene.create("b", gpus=["GPU-0"])
    scene.checked("b")
    assert kinds(scene.port_ready("b")) == ["Discard", "Reply"]
    assert "60000 are needed and 25000 are kept by 'a'" in str(scene.error())


def test_instances_that_claim_no_gpu_do_not_meet() -> None:
    scene = Scenario()
    scene.reach(State.READY, "a")
    assert kinds(scene.create("b", gpus=GPUS)) == ["Check"]
    assert kinds(scene.create("c")) == ["Check"]


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({"gpu_share": 0.4}, {"utilization": 0.9}, "more than its gpu_share of 0.4"),
        ({}, {"devices": 2}, "need 2 GPUs and it claims 1"),
        ({"sleep": "engine"}, {"cannot_sleep": "vLLM cannot sleep on cpu"}, "vLLM cannot sleep on cpu"),
    ],
)
def test_options_that_ask_for_more_than_is_claimed(fields: dict[str, Any], options: dict[str, Any], words: str) -> None:
    scene = Scenario()
    scene.create("a", GPUS[:1], **fields)
    scene.checked("a", **options)
    assert isinstance(scene.error(), InvalidRequestError)
    assert words in str(scene.error())
    assert not scene.fleet.instances


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, "names others"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "names others"),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "counted by PCI_BUS_ID"),
    ],
)
def test_variables_may_not_say_otherwise_than_the_book(variables: dict[str, str], words: str) -> None:
    scene = Scenario()
    scene.create("a", GPUS[:1], env_vars=variables)
    assert words in str(scene.error())


@pytest.mark.parametrize("visible", ["0", "GPU-0"])
def test_variables_may_say_the_same_in_either_spelling(visible: str) -> None:
    scene = Scenario()
    assert kinds(scene.create("a", GPUS[:1], env_vars={"CUDA_VISIBLE_DEVICES": visible})) == ["Check"]
