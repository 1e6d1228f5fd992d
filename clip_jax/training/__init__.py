"""Training: optimizer, train step and loop, checkpoints."""
