"""`python -m thresher.report`; its code is in `thresher.tools.report`."""
