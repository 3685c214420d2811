"""The command line, `hf-pss`: demo, train, health, sweep, report."""
