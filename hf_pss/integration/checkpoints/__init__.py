"""Checkpoints that are never lost: written whole or not at all, judged before they are resumed."""
