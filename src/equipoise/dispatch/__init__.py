"""The all-to-all of tokens, and the maps from experts to slots."""
