"""Records, shards and batches: what reaches a training step, and how it was made."""
