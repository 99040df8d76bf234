"""What works on this machine, tried for real, and what is missing."""
