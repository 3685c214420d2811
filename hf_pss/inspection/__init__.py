"""The health of checkpoints on disk, read as bytes and JSON alone.

No code here builds a model from a checkpoint's config, or opens a pickle.
"""
