"""medfed's Flower App: the only code that travels to a hospital."""
