"""Metrics of spectral health, with formula, source and cost. `metrics` has a table of them."""
