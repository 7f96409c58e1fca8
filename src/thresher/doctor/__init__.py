"""`python -m thresher.doctor`; its code is in `thresher.tools.doctor`."""
