"""Whether and how a run goes on from a checkpoint."""
