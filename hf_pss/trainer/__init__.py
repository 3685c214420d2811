"""PSS inside Hugging Face's Trainer: arguments, hooks, callback, trainer, reporting."""
