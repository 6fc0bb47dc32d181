"""The hospital's machine: SuperNode."""
