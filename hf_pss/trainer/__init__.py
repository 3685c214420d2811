"""PSS for Hugging Face's Trainer: arguments, hooks, the callback, the trainer and reporting."""
