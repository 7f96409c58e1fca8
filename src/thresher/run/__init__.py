"""Runs: train a network, evaluate a checkpoint, drop mechanisms into a trained network.

run         the Run object: folder, config, start, signals
early       check settings before Lightning is imported
train       the training, from top to bottom
evaluate    the evaluation, from top to bottom
build       build data, task, loggers, callbacks and trainer of a run
overrides   apply overrides to the config of a checkpoint
results     metrics.json, data.json, config.yaml, and tables for a terminal
loggers     loggers that need a network
spawned     trainings in spawned or forked processes
dropin/     mechanisms in a network that was trained without them
"""
