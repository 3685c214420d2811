"""Records of events and interventions, their messages, and strict JSON."""
