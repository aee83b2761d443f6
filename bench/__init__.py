"""Benchmarks: ``make bench``, or ``python -m bench`` in the root of the source tree.

Each one measures Bullpen and what a user would take instead in the same run, interleaved where that is possible, and
prints ratios: machines differ and are noisy, so a time alone says little.

``start``, ``memory``, ``daemon``, ``adoption`` and ``swap`` are the benchmarks; ``gpu_sleep`` and ``gpu_checkpoint``
are two more, for machines with an NVIDIA GPU. ``common`` has what all share, ``gpu_common`` what those two share,
``servers`` the programs that they start and end, ``client`` how they ask them, ``docs`` writes ``docs/performance.md``.
"""
