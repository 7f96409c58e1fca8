"""Runs the tests of transformers and timm over models that hold a mechanism at its dense limit."""
