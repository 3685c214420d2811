"""The command line, `hf-pss`: one module per command, and the parts that commands share."""
