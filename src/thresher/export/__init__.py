"""`python -m thresher.export`; its code is in `thresher.tools.export`."""
