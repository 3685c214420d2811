"""The health of checkpoints on disk, read only as bytes and JSON.

No code here builds a model from a checkpoint's config, or opens a pickle.
"""
