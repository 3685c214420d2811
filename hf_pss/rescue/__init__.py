"""Find out how a run failed, choose a checkpoint, and continue from it or from a repaired copy.

`investigate` reads a run: `diagnosis` and `early_ranks` find the failure, and `candidates` chooses
the checkpoint. `command` builds the command that resumes it, and `repair` writes a copy with
`smoothed_weights` and `optimizer_files`. `rescue_report` and `course_figure` show the result.
"""
