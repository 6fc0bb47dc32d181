"""The only way to the SuperLink: nginx, which passes what belongs and refuses the rest.

Standard library only: beside it the gateway's image holds ``common.errors``, ``superlink.health``
and nothing else.
"""
