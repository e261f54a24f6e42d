"""Losses, optimiser, step and loop."""
