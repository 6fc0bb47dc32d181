"""The coordinator's machine: SuperLink."""
