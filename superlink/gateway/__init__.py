"""The only way to the SuperLink: nginx, which passes what belongs and refuses the rest.

Standard library only, for this is all of the repository that the gateway's image holds.
"""
