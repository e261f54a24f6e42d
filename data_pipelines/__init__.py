"""Records in, packed numpy batches out. This package never imports jax."""
