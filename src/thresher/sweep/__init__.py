"""`python -m thresher.sweep`; its code is in `thresher.tools.sweep`."""
