"""The shell: owns processes, files, sockets and clock, and carries out what ``bullpen.core`` decides.

``supervisor`` is the one place where events enter; ``executor`` and ``creation`` carry the effects out. Around them,
each with one subject: ``zygotes`` and ``zygote`` (warm parents), ``trees`` and ``cgroups`` (who belongs to an
instance, ending all of them), ``ports``, ``logs``, ``probe``, ``gpus``, ``journal`` and ``bus`` (what must survive,
what is told), ``statedir``, ``settings``.
"""
