"""The parts and the rules that they follow."""
