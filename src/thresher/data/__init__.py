"""Data sets, one Lightning data module in each file; `images.py` has what image data sets share."""
