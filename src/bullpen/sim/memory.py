"""What a sleeping engine has of its accelerator's memory; the rules are those of vLLM's executor and its allocator."""

from dataclasses import dataclass, replace

_PARTS = frozenset({"weights", "kv_cache"})


@dataclass(frozen=True)
class Memory:
    """The state of the accelerator's memory.

    Without `--enable-sleep-mode` vLLM answers that it sleeps, and keeps all memory and the weights: its allocator
    (`pooled` memory) was not used, so there is nothing that it could give back.
    """

    pooled: bool
    asleep: frozenset[str] = frozenset()
    weights_lost: bool = False

    def slept(self, level: int) -> "Memory | None":
        """All of it asleep, from level 2 on without keeping the weights; None where it sleeps already.

        A sleep at another level changes nothing then, so level 2 after level 1 does not free what level 1 keeps.
        """
        if "weights" in self.asleep:
            return None
        return replace(self, asleep=_PARTS, weights_lost=self.weights_lost or (self.pooled and level >= 2))

    def woken(self, tags: list[str] | None) -> "Memory | None":
        """The named parts awake, or all; None where one of them does not sleep."""
        if not self.asleep or (tags and not self.asleep.issuperset(tags)):
            return None
        return replace(self, asleep=self.asleep - set(tags) if tags else frozenset())

    def reloaded(self) -> "Memory | None":
        """With the weights read again; None where there is no memory to put them into."""
        if self.pooled and "weights" in self.asleep:
            return None
        return replace(self, weights_lost=False)

    def held(self, awake_mib: int, asleep_mib: int) -> int:
        """How many MiB are in use, given how many are when all is awake and when all is asleep.

        Of what the awake engine holds, one half counts as weights and one as KV cache.
        """
        if not self.asleep or not self.pooled:
            return awake_mib
        return asleep_mib if self.asleep == _PARTS else max(awake_mib // 2, asleep_mib)
