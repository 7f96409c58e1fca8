"""Checkpoints: written whole or not at all, read without executing anything, rebuilt by name, resumed.

files       write a file atomically, with a checksum
format      every key and file name of a checkpoint and of an export
groups      store a config as names and keyword arguments, and read it back
validate    refuse files with unsafe or malformed contents
save        how Lightning writes checkpoints
load        read a checkpoint, an export or a file of weights
weights     put stored weights into a network
exports     the folder of an export
rebuild     the one way from a checkpoint to its config and its network
resume      where a training starts
"""
