"""Results of runs, read from their folders: outcomes, configs, the commands that repeat them, Pareto fronts."""
