"""Automatic parallelism planning for LLM training."""

__version__ = "0.1.0"
