"""The site gate: a hospital's own say over which code runs on its data, and what may leave.

It stands in the SuperNode's process, outside every app: before a FAB is handed to a ClientApp, and
before a reply is sent to the SuperLink. ``policy`` is what the hospital decided, ``reply`` checks
one reply, ``audit`` keeps the log, ``review`` is for the person who decides, ``gate`` is where they
meet, and ``install`` puts it in place with ``compat/site_gate.py``.
"""
