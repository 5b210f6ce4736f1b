"""What a method learns from data before it starts: sums over layers' inputs and outputs, in one pass."""
