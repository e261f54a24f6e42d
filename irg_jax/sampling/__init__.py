"""Texts and images out of a trained model: a cache, two samplers, and the trajectory over both."""
