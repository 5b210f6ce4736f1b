"""Linear layers of any kind: what they hold, which of them a config adapts."""
