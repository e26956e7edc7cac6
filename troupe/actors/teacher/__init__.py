"""The teacher: how likely it finds what the policy sampled."""
