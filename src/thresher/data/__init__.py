"""Data sets, one Lightning data module per file; `images.py` is what those of images share."""
