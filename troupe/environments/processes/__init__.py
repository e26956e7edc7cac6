"""Environments and tools in processes that can be killed."""
