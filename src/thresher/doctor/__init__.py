"""What works on this machine, and whether masks hold in a model: `python -m thresher.doctor`."""
