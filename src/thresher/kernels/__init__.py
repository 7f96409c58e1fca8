"""C++ kernels for CPUs; they compute what the PyTorch reference of a mechanism defines, only faster."""
