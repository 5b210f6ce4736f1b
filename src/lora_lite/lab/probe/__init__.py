"""Does this method work on this model? Measured facts, each beside its bound."""
