"""The adapter: its layout on the wire and its checkpoints on disk."""
