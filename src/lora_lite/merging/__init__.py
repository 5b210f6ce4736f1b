"""Adapters as plain weights: read off an fp64 copy of the layer, folded in, and taken out again."""
