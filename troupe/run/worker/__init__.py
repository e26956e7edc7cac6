"""A worker: a process on some machine that does work of a run which is somewhere else."""
