"""Starts the ranks of a job and watches over them."""
