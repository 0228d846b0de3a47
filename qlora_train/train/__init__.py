"""Training: the loop, one step, and what survives a restart."""
