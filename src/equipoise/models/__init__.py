"""Experts of Hugging Face models become slots of a rank."""
