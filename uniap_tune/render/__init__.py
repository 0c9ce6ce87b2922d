"""Plan -> launch files. Pure: the same plan gives the same bytes."""

from __future__ import annotations

from uniap_tune import __version__
from uniap_tune.megatron.versions import DEFAULT_VERSION
from uniap_tune.plan import Plan
from uniap_tune.render.deepspeed import deepspeed_files
from uniap_tune.render.megatron import megatron_files
from uniap_tune.spec import Cluster, Job, Model
from uniap_tune.strategy import Target

__all__ = ["EXECUTABLE", "LAUNCH_FILES", "render"]

EXECUTABLE = frozenset({"launch.sh", "sbatch.sh"})
# Every name render() may give a file.
_MEGATRON_FILES = {"launch.sh", "sbatch.sh", "megatron_args.yaml", "mcore.yaml", "mcore_config.py"}
LAUNCH_FILES = frozenset(_MEGATRON_FILES | {"ds_config.json", "pipeline_split.json"})


def render(
    plan: Plan, model: Model, cluster: Cluster, job: Job, *, megatron_version: str = DEFAULT_VERSION
) -> dict[str, str]:
    """The launch files of a plan for its target, by name.

    No engine runs a strategy for each layer, so target ``any`` has none: its answer is ``plan.json``.

    Raises:
        UnsupportedError: the target, or its version that is asked for, cannot run this plan.
    """
    header = f"Written by uniap-tune {__version__}, inputs {plan.inputs.get('hash', 'unknown')}."
    if plan.target is Target.MEGATRON:
        return megatron_files(plan, model, cluster, job, header, megatron_version)
    if plan.target is Target.DEEPSPEED:
        return deepspeed_files(plan, model, cluster, job, header)
    return {}
