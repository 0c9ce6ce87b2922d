"""Lines that scripts which train with a real engine print for their tests."""

from __future__ import annotations

import os


def say(text: str) -> None:
    """A line of its own on stdout, whole, whatever other ranks write at the same time."""
    os.write(1, f"\n{text}\n".encode())
