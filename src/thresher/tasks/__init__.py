"""Tasks: what a network is trained to do, one LightningModule a file."""
