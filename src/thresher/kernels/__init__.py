"""The arithmetic of mechanisms in C++, for CPUs: never a second definition of one, only a faster way to compute it."""
