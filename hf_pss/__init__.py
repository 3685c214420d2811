"""Parametric Singularity Smoothing for Hugging Face Transformers."""
