"""A run that failed: when and how, which checkpoint to go on from, and a repaired copy of it.

Like `hf_pss.inspection`, it reads bytes and JSON; a pickle is opened in `optimizer_files` alone,
where the user asked for it.
"""
