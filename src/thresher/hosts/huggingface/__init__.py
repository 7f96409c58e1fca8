"""Models of Hugging Face transformers."""

from thresher.hosts.huggingface.host import from_pretrained

__all__ = ["from_pretrained"]
