"""Callbacks and the CSV log: one kind a file."""
