"""IRG in JAX: a unified model that thinks, draws, looks, reflects and draws again (arXiv 2509.06945)."""
