"""Measure the cost of attention, bound it, and calibrate thresholds to the bound."""
