"""The command line, `hf-pss`: demo, train, report."""
