"""Hypothesis draws the same examples in every run; with UNIAP_THOROUGH=1 it draws new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
if os.environ.get("UNIAP_THOROUGH") != "1":
    settings.load_profile("repeatable")
