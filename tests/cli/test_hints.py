"""What the daemon refuses, in the words of the command line and with its ways out."""

import pytest

from bullpen.cli.hints import own_words, sentence, swap_with
from bullpen.client import Refused


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gpu_uuids: no GPU '9' on this host", "--gpu: no GPU '9' on this host"),
        ("gpus: give gpu_uuids or gpus too", "--gpus: give --gpu or --gpus too"),
        ("out: 'a' cannot both come in and go out", "OUT: 'a' cannot both come in and go out"),
        ("'b' is pinned: name it in `out` to send it away", "'b' is pinned: name it as OUT to send it away"),
        ("body: Value error, it holds text", "body: it holds text"),
        ("ask for an emulated sleep (`sleep: emulate`)", "ask for an emulated sleep (`--sleep emulate`)"),
        ("no instance 'gpus'", "no instance 'gpus'"),
        ("the model /models/gpus/x ran out: stop", "the model /models/gpus/x ran out: stop"),
    ],
)
def test_fields_have_the_names_of_options(theirs: str, ours: str) -> None:
    assert own_words(theirs) == ours


TAKEN = "GPU GPU-0 belongs to instance 'b', which is on its way there; delete that one, or choose another GPU"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (TAKEN, "`bullpen swap a x b` exchanges them"),
        ("2 GPUs are asked for and 1 are free (GPU-0: 'b', 'c'); swap", "`bullpen swap a x b` exchanges them"),
        ("GPU 0 has a share of 0.5 left, 1 is asked for; 'b' have the rest", "`bullpen swap a x b` exchanges them"),
        (f"{TAKEN}; 'b' is pinned: name it as OUT to send it away", "`bullpen swap a x b` exchanges them"),
        ("instance 'b' exists already; delete it first", "`bullpen stop b` deletes it"),
        (
            f"{TAKEN}; 'c' cannot go: vLLM cannot sleep on CPU",
            "`bullpen stop c`, then `bullpen run … --sleep emulate` starts one that can",
        ),
        (
            "vLLM cannot sleep on CPU",
            "`bullpen stop x`, then `bullpen run … --sleep emulate` starts one that can",
        ),
    ],
)
def test_conflict_has_its_way_out(text: str, advice: str) -> None:
    assert sentence(Refused(text, 409), "x", swap_with("a", ["x"])) == f"{text}; {advice}"


@pytest.mark.parametrize("status", [409, 422, 500])
def test_other_refusals_are_left_alone(status: int) -> None:
    text = "port 8000 belongs to instance 'b'; choose another --port, or leave it out"
    assert sentence(Refused(text, status)) == text
