"""The cast: one class a file, and none knows another. `troupe.pipeline` hands each its channels."""
