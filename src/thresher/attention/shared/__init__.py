"""Functions that several mechanisms share."""
