"""Ranks that come, go and die while requests are served."""
