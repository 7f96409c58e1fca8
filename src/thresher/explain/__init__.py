"""Explain one example: attention maps by layer and head, and the part of them that matters."""
