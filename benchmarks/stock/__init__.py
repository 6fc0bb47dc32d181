"""A stock Flower app in the shape of the leaderboard's template: what medfed is measured against.

It does the same work on the same model and cards (it borrows ``app``'s model, data and training),
so that only what surrounds the training differs: one array a tensor, ``Strategy.start``, and for
every message the template's imports, a partition cut by ``FederatedDataset`` and tokenised, a base
model loaded and quantised. What the template has beside that is left out, so stock is measured
kindly: no ``SFTTrainer`` is built around the training.
"""
