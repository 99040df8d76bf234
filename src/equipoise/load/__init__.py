"""What the router did: tokens per slot and expert, over a window of steps."""
