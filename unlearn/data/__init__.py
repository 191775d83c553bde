"""Rows, items and split sets."""
