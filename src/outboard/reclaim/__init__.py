"""Reclaim: how much memory is taken from which VM, and what must be reserved on the disk before it may be."""
