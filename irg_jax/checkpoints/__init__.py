"""Weights on disk: the model checkpoint (Orbax), and BAGEL's released layout in both directions."""
