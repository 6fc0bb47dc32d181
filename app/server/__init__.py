"""The coordinator's side of a run: whom to ask, what to accept, what to keep."""
