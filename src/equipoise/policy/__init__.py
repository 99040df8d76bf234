"""Where experts go: pure functions from load to placement."""
