"""Training: losses, optimizer, train step and loop, checkpoints, and the planner."""
