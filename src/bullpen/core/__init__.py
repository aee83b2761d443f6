"""Decisions without I/O: events go in, effects come out, time comes in as a value.

``instance`` says what an instance is and which states follow which. ``fleet`` is the one writer of all instances of a
node: it takes ``events``, changes its state and returns ``effects`` for ``bullpen.node`` to carry out, whose outcomes
come back as the next events. So every schedule, race and crash is a unit test without a sleep or a process.
"""
