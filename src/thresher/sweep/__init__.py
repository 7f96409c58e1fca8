"""Sweeps that survive: one child process for each trial, and a study in a database that every driver shares."""
