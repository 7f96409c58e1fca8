"""`python -m thresher.sweep`: a process for each trial, and a study in a database that all drivers share."""
