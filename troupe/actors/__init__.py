"""The actors of a run: one class a file, and none knows another. `troupe.run.pipeline` hands each its channels."""
