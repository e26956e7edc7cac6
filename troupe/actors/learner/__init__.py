"""The learner: from scored groups to new weights."""
