"""Adapters on a live model: attaching, hooks, the coefficient, and what the model remembers."""
