"""Finished work on disk, found again by key."""
