"""Protections of a training run with which PSS is compared: one idea per module, and a table."""
