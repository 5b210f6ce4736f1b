"""The S-space family: a frozen basis of the layer, and a small trained core between its directions."""
