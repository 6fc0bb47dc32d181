"""A stock Flower app in the shape of the leaderboard's template: what medfed is measured against.

It does the same work on the same model and cards (it borrows ``app``'s model, data and training),
so that only what surrounds the training differs: one array a tensor, ``Strategy.start``, a base
model loaded for every message.
"""
