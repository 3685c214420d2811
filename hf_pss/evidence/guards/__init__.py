"""Protections of a training run that PSS is compared with, one idea a module, and their table."""
