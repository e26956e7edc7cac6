"""Many runs: found in a folder, told apart by what differs between them, and laid over each other."""
