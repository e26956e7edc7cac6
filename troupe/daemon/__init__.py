"""A run that goes on by itself, and how one speaks with a run from outside.

`protocol` what is said, `place` where the socket is and who may come, `server` and `client` its two ends, `answers`
what a Supervisor makes of a request; `daemon` keeps a `trainer` process alive by the rules of `restarts`; `aftermath`
reads off a folder what became of a run that nobody plays any more. Nothing of it imports MLX but the trainer.
"""
