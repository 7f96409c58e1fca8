"""Drop-in evaluation: put mechanisms into a network that was trained without them."""

from thresher.run.dropin.run import evaluate

__all__ = ["evaluate"]
