"""`python -m thresher.report`: compare runs, on a page, in files and in the terminal."""
