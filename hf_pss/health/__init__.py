"""Spectral health: one metric a file, each with its formula, source and cost."""
