"""Shows a job: live tables, one-file HTML, JSON."""
