"""Checkpoints edited from disk to disk, in the memory of a few blocks."""
