"""Follow a live run from the files that it writes: for `hf-pss watch`."""
