"""How experts get there: the difference of two placements."""
