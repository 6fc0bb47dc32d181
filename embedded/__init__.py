"""A model and a deck of flashcards that need no hub and no account."""
