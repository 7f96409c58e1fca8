"""What stands in a model, or would: `python -m thresher.hosts network=MODEL`."""
