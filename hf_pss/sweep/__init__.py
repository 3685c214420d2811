"""Paired runs over a grid of recipes, learning rates, guards and seeds, and what they show."""
