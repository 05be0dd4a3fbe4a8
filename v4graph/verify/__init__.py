"""Compare implementations of a model with each other, and graphs before and after a pass."""
