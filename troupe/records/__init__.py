"""Everything a run writes for people, and reading it again."""
