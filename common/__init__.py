"""The ground floor: what several rooms need, and what imports nothing else of the repository."""
