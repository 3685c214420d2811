"""Find out how a run failed, choose a checkpoint, and continue from it or from a repaired copy.

`investigate` reads a run. It uses `diagnosis` to find the failure, and `candidates` to choose the
checkpoint. `command` builds the command that resumes the run. `repair` writes a repaired copy with
the help of `smoothed_weights`. `rescue_report` shows the result.
"""
