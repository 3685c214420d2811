"""Checkpoints on disk, read as bytes and JSON alone: what they hold, and how healthy it is.

No model is built from a checkpoint's config, and no pickle is opened.
"""
