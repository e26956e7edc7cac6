"""What samples of each row say about a policy: avg@k, pass@k, maj@k, with standard errors; and pairs of policies."""
