"""Starts the ranks of a job: as processes of this machine, or as one process of torchrun's."""
