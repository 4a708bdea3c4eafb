"""Training: the flow-matching objective, the loop, and the state of a run on disk."""
