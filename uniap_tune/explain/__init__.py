"""Reasons for a plan: where its time and memory go, and what anything else would cost."""
