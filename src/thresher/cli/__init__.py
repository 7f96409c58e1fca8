"""The command line: what `train.py` and `eval.py` call."""
