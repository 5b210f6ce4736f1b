"""What methods cost: counted from shapes, and measured by a clock and a meter."""
