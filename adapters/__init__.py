"""Formats in and out of the planner, one file a format.

``read_model(source)`` is the way in: it asks every reader registered under the entry-point group
``uniap_tune.adapters`` whether the source is its own.
"""

from .registry import ModelReader, read_model

__all__ = ["ModelReader", "read_model"]
