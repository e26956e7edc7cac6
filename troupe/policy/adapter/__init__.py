"""What is trained beside a base that stays as it is: which modules, in which files, and what it makes of the base."""
