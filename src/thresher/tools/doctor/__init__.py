"""`python -m thresher.doctor`: which kernels work on this machine, and whether the masks of a model hold."""
