"""The model and its local training."""
