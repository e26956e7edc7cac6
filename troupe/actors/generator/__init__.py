"""The generator, in a thread or in processes of its own."""
