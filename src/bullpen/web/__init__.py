"""The HTTP faces over one supervisor: ``v2`` (many instances), ``v1`` (one), ``system`` (health, readiness, page).

``app`` puts them together, ``access`` decides who may call, ``models`` and ``errors`` say what goes over the wire.
"""
