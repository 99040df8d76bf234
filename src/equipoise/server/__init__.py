"""HTTP in front of a service: OpenAI's endpoints, and those that operators need."""
