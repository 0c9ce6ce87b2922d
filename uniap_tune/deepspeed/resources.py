"""Which devices a ``deepspeed`` command will use, and the cluster they make.

The hostfile and ``--include``, ``--exclude``, ``--num_nodes``, ``--num_gpus`` choose the devices by DeepSpeed's own
functions; what a device is comes from an explicit ``cluster`` or from what this machine has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.errors import InputError
from uniap_tune.spec import Cluster

_FIX = 'say what the devices are, as in "autotuning": {"uniap": {"cluster": "2x8:h100"}} or --uniap_cluster 2x8:h100'
_LOCALHOST = "localhost"
_QUERY_SECONDS = 60
_QUERIES = (
    ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
    (
        sys.executable,
        "-c",
        "import torch; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), sep='\\n')",
    ),
)

# (nodes, devices of a node) as batch systems and torchrun tell them to a job.
_ENVIRONMENTS = (("SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"), ("SLURM_NNODES", "SLURM_NTASKS_PER_NODE"))


class Runner(Protocol):
    """What is used of ``deepspeed.launcher.runner``."""

    fetch_hostfile: Callable[[str], Mapping[str, int] | None]
    parse_inclusion_exclusion: Callable[[Mapping[str, int], str, str], Mapping[str, list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Nodes of equally many devices. ``source`` says where the counts come from; ``hosts``: from a hostfile."""

    nodes: int
    devices: int
    source: str
    hosts: bool = False

    @property
    def world_size(self) -> int:
        """Devices together."""
        return self.nodes * self.devices


def find_cluster(
    options: Any,
    explicit: str | None,
    runner: Runner,
    environment: Mapping[str, str],
    *,
    device_count: Callable[[], int],
    launches: bool,
) -> tuple[Cluster, Shape]:
    """The cluster that the command will use.

    Args:
        options: what DeepSpeed's parser made of the command.
        explicit: the ``cluster`` key, which supplies the hardware.
        runner: DeepSpeed's launcher.
        environment: variables of the process.
        device_count: counts the devices of this machine.
        launches: the training will be started, so that without a hostfile only this machine counts.

    Raises:
        InputError: nodes of unequal sizes, more than the explicit cluster has, or devices nobody described.
    """
    whole = read_cluster(explicit) if explicit else None
    shape = _shape(options, whole, runner, environment, device_count, launches)
    if whole is None:
        return read_cluster(f"{shape.nodes}x{shape.devices}:{_local_device()}"), shape
    if shape.nodes > whole.num_nodes or shape.devices > whole.devices_per_node:
        raise InputError(
            f"{shape.source}: {shape.nodes} x {shape.devices} devices",
            why=f"the cluster {whole.name} has {whole.num_nodes} x {whole.devices_per_node}",
            fix="correct the cluster, or use fewer with --num_nodes and --num_gpus",
        )
    return part_of(whole, shape.nodes, shape.devices), shape


def part_of(cluster: Cluster, nodes: int, devices: int) -> Cluster:
    """A cluster with fewer nodes, or fewer devices used of each; every device keeps its share of the network."""
    if (nodes, devices) == (cluster.num_nodes, cluster.devices_per_node):
        return cluster
    domain = cluster.domain_size
    if domain is not None and domain >= cluster.devices_per_node:
        domain = domain // cluster.devices_per_node * devices
    elif domain is not None:
        domain = min(domain, devices)
    return replace(
        cluster,
        name=f"{nodes}x{devices} of {cluster.name}",
        num_nodes=nodes,
        devices_per_node=devices,
        rails_per_node=max(1, cluster.rails_per_node * devices // cluster.devices_per_node),
        domain_size=domain,
    )


def _shape(
    options: Any,
    whole: Cluster | None,
    runner: Runner,
    environment: Mapping[str, str],
    device_count: Callable[[], int],
    launches: bool,
) -> Shape:
    filtered = bool(options.include or options.exclude)
    if filtered and (options.num_nodes >= 0 or options.num_gpus >= 0):
        raise InputError("--include and --exclude cannot be used with --num_nodes and --num_gpus", fix="use one kind")
    try:
        pool = runner.fetch_hostfile(options.hostfile)
    except ValueError as error:
        raise InputError(f"{options.hostfile}: {error}", fix="one line 'name slots=N' a host") from None
    if pool is not None:
        return _limited(_filtered(pool, options, runner), options, str(options.hostfile), hosts=True)
    if not launches:
        told = _told(environment) if not filtered and options.num_nodes < 0 and options.num_gpus < 0 else None
        if told is not None:
            return told
        if whole is not None and not filtered:
            nodes = options.num_nodes if options.num_nodes > 0 else whole.num_nodes
            devices = options.num_gpus if options.num_gpus > 0 else whole.devices_per_node
            limits = [name for name in ("num_nodes", "num_gpus") if getattr(options, name) > 0]
            source = "".join(f"--{name} of " for name in limits) + f"the cluster {whole.name}"
            return Shape(nodes=nodes, devices=devices, source=source)
    if options.num_nodes > 1:
        raise InputError(f"--num_nodes {options.num_nodes}: there is no hostfile", fix="give --hostfile FILE")
    count = device_count() if launches or whole is None else whole.devices_per_node
    return _local(options, runner, environment, count)


def _local(options: Any, runner: Runner, environment: Mapping[str, str], count: int) -> Shape:
    """The devices of this machine, as DeepSpeed's launcher chooses them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if options.num_gpus > 0:
        return Shape(nodes=1, devices=options.num_gpus, source="--num_gpus")
    if visible and not (options.include or options.exclude):
        return Shape(nodes=1, devices=len(visible.split(",")), source="CUDA_VISIBLE_DEVICES")
    if count == 0:
        raise InputError("this machine has no devices to plan for", fix=_FIX)
    return _limited(_filtered({_LOCALHOST: count}, options, runner), options, "this machine", hosts=False)


def _filtered(pool: Mapping[str, int], options: Any, runner: Runner) -> Mapping[str, list[int]]:
    try:
        return runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
    except ValueError as error:
        raise InputError(str(error), fix="correct --include or --exclude") from None


def _limited(active: Mapping[str, list[int]], options: Any, source: str, *, hosts: bool) -> Shape:
    counts = [len(slots) for slots in active.values()]
    if options.num_nodes > 0:
        counts = counts[: options.num_nodes]
    if options.num_gpus > 0:
        counts = [options.num_gpus] * len(counts)
    if not counts:
        raise InputError(f"{source}: no devices are left", fix="correct --include or --exclude")
    if len(set(counts)) > 1:
        raise InputError(
            f"{source}: nodes with {min(counts)} and with {max(counts)} devices",
            why="a plan needs nodes of equally many devices",
            fix=f"use {min(counts)} of each with --num_gpus {min(counts)}, or leave nodes out with --exclude",
        )
    return Shape(nodes=len(counts), devices=counts[0], source=source, hosts=hosts)


def _told(environment: Mapping[str, str]) -> Shape | None:
    """The shape that a batch system or torchrun told this process."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isascii() and text.isdecimal() else 0

    for nodes, devices in _ENVIRONMENTS:
        if number(nodes) and number(devices):
            return Shape(nodes=number(nodes), devices=number(devices), source=f"{nodes}, {devices}")
    world, local = number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE") or number("LOCAL_SIZE")
    if world and local and world % local == 0:
        return Shape(nodes=world // local, devices=local, source="WORLD_SIZE")
    return None


def _local_device() -> str:
    """The name of this machine's device as its driver reports it.

    torch is asked in a process of its own: it would hold memory of the first device as long as the training runs.
    """
    reasons = []
    for query in _QUERIES:
        program = shutil.which(query[0])
        if program is None:
            reasons.append(f"there is no {query[0]}")
            continue
        try:
            run = subprocess.run(
                [program, *query[1:]], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{query[0]}: {str(error).splitlines()[0][:200]}")
            continue
        names = sorted({line.strip() for line in run.stdout.splitlines() if line.strip()})
        if len(names) > 1:
            raise InputError("devices of one kind are expected", why=f"this machine has {', '.join(names)}", fix=_FIX)
        if names:
            return names[0]
        reasons.append("torch sees no device")
    raise InputError("what the devices are is not known", why="; ".join(reasons), fix=_FIX)
