"""Configurations: parse and check overrides, read the command line of eval.py, redact secrets."""
