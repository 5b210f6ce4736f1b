"""Tasks: where questions come from, in splits that share nothing, and how replies are scored."""
