"""Drop-in evaluation: what mechanisms do to a trained network that never saw them."""

from thresher.dropin.run import evaluate

__all__ = ["evaluate"]
