"""`python -m thresher.bench`: mechanisms against PyTorch's dense attention, checked first, then timed in turns."""
