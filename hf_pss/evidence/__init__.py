"""Measures and demonstrates what PSS does: sweeps, guards, the demo and its report."""
