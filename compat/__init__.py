"""Everything that touches Flower's inside: one file a hook, and one report of what is active.

Nobody else imports a private name of Flower's. ``hooks`` knows every hook; ``digests`` decides
whether the installed Flower is the one that a hook was written for; ``superlink`` and ``supernode``
start Flower's programs with the hooks that it allows. The other files pass private names on to the
rooms that need them.
"""

from .hooks import Report, report

__all__ = ["Report", "report"]
