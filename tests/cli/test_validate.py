"""``bullpen validate``: what it says of models that sleep well, badly, or not at all, and that it leaves nothing."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bullpen.cli import main
from bullpen.cli.asking import AskError, Server, same_answer
from bullpen.cli.validate import find_key
from bullpen.cli.validating import LONGEST_WHY, Outcome, Step, Validation, is_well, one_line, verdict
from bullpen.client import BullpenClient, ConnectionFailed, Explanation, Instance, Readiness, Refused
from tests.cli.terminal import Terminal

Output = pytest.CaptureFixture[str]
SLEEPS = ["level 1", "level 2", "emulated"]


def steps_of(capsys: Output, *arguments: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Run it; return the exit code, the document and its steps by name."""
    code = main(["validate", "org/tiny", "--json", *arguments])
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0)
    return code, document, {step["name"]: step for step in document["steps"]}


def test_model_that_sleeps_well(client: BullpenClient, capsys: Output) -> None:
    code, document, steps = steps_of(capsys, "-e", "BULLPEN_SIM_ASLEEP_MIB=77")
    assert code == 0 and document["verdict"] == "org/tiny: sleep works: level 1, level 2, emulated."
    assert list(steps) == [
        "start",
        "answer",
        *(
            f"{verb}{kind}"
            for kind in SLEEPS
            for verb in (f"sleep {'' if kind == 'emulated' else 'at '}", "wake from ")
        ),
    ]
    assert all(step["outcome"] == "works" and step["seconds"] > 0 for step in steps.values())
    held = [steps[name]["gpu_mib"] for name in ("start", "sleep at level 1", "sleep at level 2", "sleep emulated")]
    assert held == [1024, 77, 77, 0]
    assert client.list().instances == []


def test_people_read_a_table(client: BullpenClient, capsys: Output) -> None:
    client.create("--model m", instance_id="validate-tiny")
    assert main(["validate", "org/tiny"]) == 0
    shown = capsys.readouterr()
    heading, *rows, stored, said = shown.out.splitlines()
    assert heading.split() == ["STEP", "VERDICT", "TIME", "GPU", "MiB", "HOST", "MiB"]
    assert len(rows) == 8 and all("✓ works" in row for row in rows)
    assert said == "org/tiny: sleep works: level 1, level 2, emulated."
    assert stored == "Stored for the ladder: level 1 works, level 2 works."
    assert "validate-tiny-2: sleep at level 1\n" in shown.err
    assert [instance.instance_id for instance in client.list().instances] == ["validate-tiny"]


def test_wake_that_fails_is_told_with_the_daemons_reason(client: BullpenClient, capsys: Output) -> None:
    code, document, steps = steps_of(capsys, "-e", "BULLPEN_SIM_FAIL=wake")
    assert code == 1
    assert document["verdict"] == "org/tiny: sleep works: emulated; does not work: level 1, level 2."
    for kind in ("level 1", "level 2"):
        assert steps[f"sleep at {kind}"]["outcome"] == "works"
        step = steps[f"wake from {kind}"]
        assert step["outcome"] == "fails" and "had to restart it" in step["detail"] and "wake_up" in step["detail"]
    assert document["stored"] == [], "the daemon has seen for itself what failed"


def answers_otherwise(monkeypatch: pytest.MonkeyPatch, fail_file: Path, *wrong: int) -> None:
    """Let the simulator answer wrongly to these of validate's questions, and rightly to the daemon's canaries."""
    asked, ask = [0], Server.ask

    def ask_it(server: Server) -> str:
        asked[0] += 1
        fail_file.write_text("answer" if asked[0] in wrong else "")
        try:
            return ask(server)
        finally:
            fail_file.write_text("")

    monkeypatch.setattr(Server, "ask", ask_it)


def test_ladder_skips_what_answers_otherwise_until_it_is_found_well(
    client: BullpenClient, capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["validate", "org/differs", "-e", f"BULLPEN_SIM_FAIL_FILE={tmp_path / 'fail'}"]
    with monkeypatch.context() as wrongly:
        answers_otherwise(wrongly, tmp_path / "fail", 2)
        assert main([*arguments, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    outcomes = {step["name"]: step["outcome"] for step in document["steps"]}
    assert (outcomes["wake from level 1"], outcomes["wake from level 2"]) == ("differs", "works")
    assert [(one["kind"], one["works"], one["problem"]) for one in document["stored"]] == [
        ("level 1", False, ""),
        ("level 2", True, ""),
    ]
    client.create("--model org/differs", instance_id="a", gpus=1, sleep_after=3600)
    client.wait_until_ready("a", timeout=30)
    found = client.explain("a")
    assert found.works["level_1"] is not None and "answers otherwise" in found.works["level_1"].why
    assert found.next_step is not None and found.next_step.to == "level_2"
    assert client.sleep("a").sleep_level == 2, "the lightest that works"
    client.delete("a")

    assert main(arguments) == 0
    assert "Stored for the ladder: level 1 works, level 2 works.\n" in capsys.readouterr().out
    client.create("--model org/differs", instance_id="a", gpus=1)
    client.wait_until_ready("a", timeout=30)
    assert client.sleep("a").sleep_level == 1


def test_idle_instance_goes_by_what_was_stored(
    client: BullpenClient, capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers_otherwise(monkeypatch, tmp_path / "fail", 2)
    assert main(["validate", "org/idle", "-e", f"BULLPEN_SIM_FAIL_FILE={tmp_path / 'fail'}"]) == 1
    shown = capsys.readouterr().out
    assert "Stored for the ladder: level 1 does not work, level 2 works.\n" in shown
    client.create("--model org/idle", instance_id="a", gpus=1, sleep_after=0.2)
    for event in client.follow("a", timeout=30):
        if event.instance is not None and event.instance.state == "sleeping":
            break
    assert client.get("a").sleep_level == 2


def test_table_is_shown_although_nothing_could_be_stored(
    client: BullpenClient, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: BullpenClient, instance_id: str, level: int, **found: Any) -> None:
        raise ConnectionFailed("the connection broke")

    monkeypatch.setattr(BullpenClient, "judge", judge)
    assert main(["validate", "org/tiny"]) == 0
    heading, *rows, first, second, said = capsys.readouterr().out.splitlines()
    assert heading.startswith("STEP") and len(rows) == 8
    assert first == "Not stored for the ladder: level 1 works: the connection broke"
    assert second == "Not stored for the ladder: level 2 works: the connection broke"
    assert said == "org/tiny: sleep works: level 1, level 2, emulated."


def test_sleep_that_fails_needs_no_wake(client: BullpenClient, capsys: Output) -> None:
    code, _, steps = steps_of(capsys, "-e", "BULLPEN_SIM_FAIL=sleep")
    assert code == 1 and steps["sleep at level 1"]["outcome"] == "fails" and "wake from level 1" not in steps


def test_start_that_fails_is_the_end(client: BullpenClient, capsys: Output) -> None:
    code, document, steps = steps_of(capsys, "-e", "BULLPEN_SIM_FAIL=start")
    assert code == 1 and list(steps) == ["start"]
    assert document["verdict"] == "org/tiny cannot be used: start fails." and steps["start"]["detail"]
    assert client.list().instances == []


def test_embedding_model_is_asked_for_an_embedding(client: BullpenClient, capsys: Output) -> None:
    code, _, steps = steps_of(capsys, "--", "--runner", "pooling")
    assert code == 0 and steps["wake from level 2"]["outcome"] == "works"


def test_key_of_the_server_is_used(client: BullpenClient, capsys: Output) -> None:
    assert steps_of(capsys, "--", "--api-key", "secret")[0] == 0


def test_wrong_options_are_one_line(client: BullpenClient, capsys: Output) -> None:
    assert main(["validate", "m", "--", "--bogus"]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("bullpen: ") and "--bogus" in last
    assert client.list().instances == []


def test_ctrl_c_leaves_nothing(client: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("validate", "m", "-e", "BULLPEN_SIM_START_SECONDS=30")
    terminal.wait_for("starting, ")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text and client.list().instances == []


@pytest.mark.parametrize(
    ("options", "key"),
    [([], None), (["--api-key", "a"], "a"), (["--api-key=b"], "b"), (["--api-key"], None)],
)
def test_key_is_found_in_the_options(options: list[str], key: str | None) -> None:
    assert find_key(options, {}) == key
    assert find_key([], {"VLLM_API_KEY": "c"}) == "c"


# -- what no simulator does ----------------------------------------------------------------------------------------


class Fleet:
    """Stands for a client whose instance does as it is told: see the arguments."""

    def __init__(self, url: str, *, sleeps: bool = True, refused: int | None = None) -> None:
        self.url = url
        self.sleeps = sleeps
        self.refused = refused
        self.created: list[str] = []
        self.judged: list[tuple[int, bool, str]] = []
        self.pid = 1
        self.deleted = 0
        self.warming = 0

    def ready(self) -> Readiness:
        state = "warming" if self.warming else "warm"
        self.warming = max(0, self.warming - 1)
        return Readiness.read({"engine": "vllm", "zygotes": [{"engine": "vllm", "state": state}]})

    def create(self, options: str, *, instance_id: str, sleep: str, **fields: Any) -> None:
        assert not self.warming
        if sleep == "engine" and not self.sleeps:
            raise Refused("this engine cannot sleep on the CPU", 422)
        self.created.append(sleep)

    def wait_until_ready(self, instance_id: str, on_change: object) -> Instance:
        return self.get(instance_id)

    def get(self, instance_id: str) -> Instance:
        depths = ("awake", "level_1", "level_2")
        memory = {depth: {"gpu_mib": None, "host_mib": 5} for depth in depths}
        return Instance.read(
            {
                "instance_id": instance_id,
                "state": "ready",
                "pid": self.pid,
                "url": self.url,
                "model": "m",
                "memory": memory,
            }
        )

    def sleep(self, instance_id: str, level: int | None) -> None:
        if self.refused is not None:
            raise Refused("no", self.refused)

    def wake(self, instance_id: str) -> None:
        pass

    def explain(self, instance_id: str) -> Explanation:
        return Explanation.read({"works": {"level_1": None, "level_2": None}})

    def judge(self, instance_id: str, level: int, *, works: bool, why: str) -> None:
        assert not self.deleted, "while there is an instance to judge"
        self.judged.append((level, works, why))

    def delete(self, instance_id: str) -> None:
        self.deleted += 1


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that gives these answers, one after the other, the last one for ever; return its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(*answers: tuple[int, Any], path: str = "/v1/completions") -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, body = (left.pop(0) if len(left) > 1 else left[0]) if self.path == path else (404, {})
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def text(answer: str) -> tuple[int, Any]:
    return 200, {"choices": [{"text": answer}]}


def validate(fleet: Fleet) -> Validation:
    validation = Validation(fleet, "v", "--model m", {}, None, lambda text: None)  # type: ignore[arg-type]
    validation.run()
    return validation


def outcomes(validation: Validation) -> dict[str, str]:
    return {step.name: str(step.outcome) for step in validation.steps}


def test_another_answer_after_the_wake_is_told(serve: Serve) -> None:
    fleet = Fleet(serve(text("a"), text("a"), text("b"), text("a")))
    validation = validate(fleet)
    assert outcomes(validation)["wake from level 1"] == "works"
    assert outcomes(validation)["wake from level 2"] == "differs"
    assert not is_well(validation.steps)
    assert verdict("m", validation.steps) == "m: sleep works: level 1, emulated; does not work: level 2."
    assert fleet.created == ["engine", "emulate"] and fleet.deleted == 2
    assert [one[:2] for one in fleet.judged] == [(1, True), (2, False)]
    assert [why for *_, why in fleet.judged] == [judged.why for judged in validation.judged]


def test_no_answer_after_the_wake_fails(serve: Serve) -> None:
    fleet = Fleet(serve(text("a"), (500, {}), text("a")))
    assert outcomes(validate(fleet))["wake from level 1"] == "fails"
    assert [one[:2] for one in fleet.judged] == [(1, False), (2, True)]
    assert "HTTP 500" in fleet.judged[0][2]


def test_restart_instead_of_a_wake_is_no_word_about_the_level(serve: Serve) -> None:
    class Restarts(Fleet):
        def wake(self, instance_id: str) -> None:
            self.pid += 1

    fleet = Restarts(serve(text("a")))
    found = outcomes(validate(fleet))
    assert found["wake from level 1"] == found["wake from level 2"] == "fails"
    assert found["wake from emulated"] == "works" and fleet.judged == []


def test_reason_is_what_the_daemon_takes() -> None:
    assert one_line("a\nb\x00c \x1b[1m\ud800 ") == "a b c [1m"
    assert len(one_line("x" * 1000)) == LONGEST_WHY


def test_no_answer_at_all_is_the_end(serve: Serve) -> None:
    validation = validate(Fleet(serve((500, {}))))
    assert outcomes(validation) == {"start": "works", "answer": "fails"}
    assert verdict("m", validation.steps) == "m cannot be used: answer fails."


def test_engine_without_sleep_is_tried_with_emulated_sleep(serve: Serve) -> None:
    fleet = Fleet(serve(text("a")), sleeps=False)
    validation = validate(fleet)
    assert fleet.created == ["emulate"] and validation.why_emulated == "this engine cannot sleep on the CPU"
    assert outcomes(validation)["sleep at level 1"] == "not available" and is_well(validation.steps)
    assert validation.judged == [] and fleet.judged == []
    assert verdict("m", validation.steps) == "m: sleep works: emulated; not available: level 1, level 2."


def test_engine_is_waited_for(serve: Serve) -> None:
    fleet = Fleet(serve(text("a")))
    fleet.warming = 2
    told: list[str] = []
    validation = Validation(fleet, "v", "--model m", {}, None, told.append)  # type: ignore[arg-type]
    validation.run()
    assert told[0] == told[1] == "engine vllm is being imported" and is_well(validation.steps)


def test_instance_of_that_name_that_is_somebody_elses_stays(serve: Serve) -> None:
    class Taken(Fleet):
        def create(self, options: str, *, instance_id: str, sleep: str, **fields: Any) -> None:
            raise Refused(f"instance '{instance_id}' exists already", 409)

    fleet = Taken(serve(text("a")))
    with pytest.raises(Refused, match="exists already"):
        validate(fleet)
    assert fleet.deleted == 0


@pytest.mark.parametrize(("status", "outcome"), [(409, "not available"), (500, "fails")])
def test_refused_sleep(serve: Serve, status: int, outcome: str) -> None:
    validation = validate(Fleet(serve(text("a")), refused=status))
    assert outcomes(validation)["sleep at level 1"] == outcomes(validation)["sleep emulated"] == outcome
    assert is_well(validation.steps) == (status == 409)


def test_embedding_is_compared_with_tolerance(serve: Serve) -> None:
    def embedding(*values: float) -> tuple[int, Any]:
        return 200, {"data": [{"embedding": values}]}

    answers = [embedding(1.0, 0.5), embedding(1.0, 0.5001), embedding(0.5, 1.0)]
    server = Server(serve(*answers, path="/v1/embeddings"), "m")
    first, near, far = server.ask(), server.ask(), server.ask()
    assert same_answer(first, near) and not same_answer(first, far)


@pytest.mark.parametrize("answer", [(500, {}), (200, {"choices": []}), (200, 3)])
def test_what_is_no_answer_is_an_error(serve: Serve, answer: tuple[int, Any]) -> None:
    with pytest.raises(AskError):
        Server(serve(answer), "m").ask()


def test_server_that_is_gone_is_an_error() -> None:
    with pytest.raises(AskError, match=r"127\.0\.0\.1:9/v1/completions does not answer"):
        Server("http://127.0.0.1:9", "m").ask()


def test_nothing_tried_is_not_well() -> None:
    assert not is_well([])
    assert is_well([Step("start", "", Outcome.WORKS), Step("sleep", "level 1", Outcome.NOT_AVAILABLE)])
