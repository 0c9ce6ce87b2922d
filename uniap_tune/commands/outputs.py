"""What several commands print alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniap_tune.errors import InfeasibleError


def print_json(document: Mapping[str, object]) -> None:
    """A document on stdout; ``nan`` and ``inf``, which JSON does not have, are an error."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_infeasible(error: InfeasibleError) -> None:
    """The document of ``--json`` where nothing fits: what would make the job fit."""
    print_json({"schema_version": 1, "status": "infeasible", "relaxations": list(error.relaxations)})
