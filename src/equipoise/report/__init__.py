"""What a job's records say, for a terminal, a browser and programs."""
