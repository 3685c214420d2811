"""The command line, `hf-pss`: one module a command, and the parts that they share."""
