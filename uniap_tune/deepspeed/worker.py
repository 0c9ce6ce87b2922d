"""Runs an unmodified training script with its ``PipelineModule`` cut as planned.

``deepspeed --module uniap_tune.deepspeed.worker train.py ARGUMENTS`` starts it on every rank; the environment variable
``PYTHON_UNIAP_TUNE_PLAN`` names the plan. ``-m package.module`` in place of the script runs a module.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from uniap_tune.deepspeed.pipeline import patch_pipeline_module
from uniap_tune.errors import InputError


def main(argv: Sequence[str]) -> None:
    """Patch, then run the script as ``python SCRIPT`` would.

    Raises:
        InputError: no script.
    """
    arguments = list(argv)
    # The launcher puts --local_rank=N before the script's name; the script expects it among its arguments.
    ranks = []
    while arguments and arguments[0].startswith("--local_rank"):
        ranks.append(arguments.pop(0))
    as_module = arguments[:1] == ["-m"]
    if as_module:
        del arguments[0]
    if not arguments:
        raise InputError("no script to run", fix="deepspeed --module uniap_tune.deepspeed.worker train.py …")
    script, *rest = arguments
    sys.argv = [script, *ranks, *rest]
    patch_pipeline_module()
    if as_module:
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
