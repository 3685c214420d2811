"""Decide from plain numbers whether training is in trouble, without tensors, model or optimizer."""
