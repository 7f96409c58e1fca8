"""A trained network as files for use elsewhere: `python -m thresher.export ckpt=RUN`."""
