"""The spine: when to plan, move and commit."""
