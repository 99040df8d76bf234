"""Benchmarks that a user can run; each prints a table and gives its rows as JSON."""
