"""The reference engine: requests in, tokens out, ranks in lockstep."""
