"""Works on a torch model: its matrices, and how they are measured and changed."""
