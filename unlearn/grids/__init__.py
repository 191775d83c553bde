"""Grids of jobs: planned, submitted, looked after and reported."""
