"""What the daemon refuses, in this command line's words and with its ways out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from bullpen.errors import BullpenError

if TYPE_CHECKING:
    from bullpen.client import BullpenClient

Way = Callable[[str], str]
"""What to do about the instance that has a GPU, given its id."""

FIELDS: Mapping[str, str] = {
    "gpu_uuids": "--gpu",
    "gpu_share": "--gpu-share",
    "gpus": "--gpus",
    "env_vars": "--env",
    "sleep_after": "--sleep-after",
    "discard_after": "--discard-after",
    "stop_after": "--stop-after",
    "sleep_level": "--level",
    "instance_id": "--id",
}
"""What the fields of the REST API are called here."""
LEADING: Mapping[str, str] = {"out": "OUT", "drain": "--drain", "priority": "--priority"}
"""The same for words that mean a field only where a sentence begins with them and a colon."""
PHRASES: Mapping[str, str] = {"Value error, ": "", "in `out`": "as OUT", "`sleep: ": "`--sleep "}
FIELD = re.compile(rf"(?<![\w'/-])(?:{'|'.join(FIELDS)})(?![\w'/])")
LEAD = re.compile(rf"(?:{'|'.join(LEADING)})(?=: )")
OWNER = re.compile(r"(?:GPU \S+ belongs to instance|are free \(\S+:|is asked for;) '([^']+)'")
CANNOT_SLEEP = re.compile(r"cannot sleep|was started without sleep")
STAYS = re.compile(r"instance '([^']+)' was started|'([^']+)' cannot go: ")


class AdvisedError(BullpenError):
    """A refusal that has been put into its last form already."""


def sentence(problem: BullpenError, name: str = "ID", way: Way | None = None) -> str:
    """An error's sentence, with the way out that this command line has.

    Args:
        problem: what went wrong.
        name: whom it was about.
        way: what to do about the instance that has the GPU; None: it sleeps or is stopped.
    """
    from bullpen.client import Refused

    if not isinstance(problem, Refused):
        return str(problem)
    text = own_words(str(problem))
    if problem.status == 404:
        return f"{text}; `bullpen ps` lists those there are"
    advice = advise(text, name, way or sleep_or_stop) if problem.status == 409 else ""
    return f"{text}; {advice}" if advice else text


def own_words(text: str) -> str:
    """A sentence of the REST API in the words of the command line."""
    for theirs, ours in PHRASES.items():
        text = text.replace(theirs, ours)
    lead = LEAD.match(text)
    if lead:
        text = LEADING[lead[0]] + text[lead.end() :]
    return FIELD.sub(lambda found: FIELDS[found[0]], text)


def advise(text: str, name: str, way: Way) -> str:
    """What to do about a conflict; empty where the sentence says it all."""
    if CANNOT_SLEEP.search(text):
        found = STAYS.search(text)
        stays = name if found is None else found[1] or found[2]
        return f"`bullpen stop {stays}`, then `bullpen run … --sleep emulate` starts one that can"
    owner = OWNER.search(text)
    if owner:
        return way(owner[1])
    named = re.search(r"instance '([^']+)'", text)
    return f"`bullpen stop {named[1] if named else name}` deletes it" if "; delete " in text else ""


def sleep_or_stop(owner: str) -> str:
    """Both ways to have an instance's GPU."""
    return f"`bullpen sleep {owner}` puts it to sleep, `bullpen stop {owner}` deletes it"


def swap_with(incoming: str, outgoing: Sequence[str] = ()) -> Way:
    """The way of what is to come up in the place of another."""
    return lambda owner: f"`{' '.join(['bullpen swap', incoming, *outgoing, owner])}` exchanges them"


def make_room(client: BullpenClient) -> Way:
    """The way of what is new: the daemon is asked whether the owner can sleep."""

    def way(owner: str) -> str:
        with suppress(BullpenError):
            if client.get(owner).can_sleep:
                return f"`bullpen sleep {owner}` puts it to sleep"
        return f"`bullpen stop {owner}` deletes it"

    return way
