"""What a machine gives, measured within minutes, and the file that holds it."""
