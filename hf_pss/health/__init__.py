"""Metrics of spectral health, each with its formula, source and cost; see `metrics` for a table."""
