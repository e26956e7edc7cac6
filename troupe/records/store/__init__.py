"""run.sqlite: every step, group, completion and incident of a run."""
