"""From bytes to batches on the host: sources, transforms, loader. Nothing here imports jax."""
