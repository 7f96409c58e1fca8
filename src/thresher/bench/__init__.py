"""`python -m thresher.bench`; its code is in `thresher.tools.bench`."""
