"""Question–answer cards, from a hospital's files to tokens."""
