"""Carries a plan out: staging, exchange, commit to slots."""
