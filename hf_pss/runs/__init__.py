"""A run's folder: names, limits, and how its files are read and written."""
