"""PSS inside Hugging Face's Trainer: arguments, callback, trainer, checkpoints, reporting."""
