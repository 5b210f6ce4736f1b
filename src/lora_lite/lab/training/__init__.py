"""One training run: data, the loop, checkpoints, evaluation, and what was found."""
