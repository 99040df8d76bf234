"""A job of the reference engine: the same prompts with balancing off and on, recorded."""
