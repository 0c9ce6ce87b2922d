"""The cluster of a measurement record."""

from __future__ import annotations

import re

from uniap_tune import hardware
from uniap_tune.errors import InputError
from uniap_tune.spec import Cluster, Link

from .record_fields import Fields, SkippedRecordError, count, text


def read_record_cluster(record: Fields, num_gpus: int) -> Cluster:
    """The cluster of a record: its GPU in the node it usually comes in, unless the record says otherwise.

    ``gpu`` or ``hardware`` names the GPU; "8/node" in it gives the devices of a node, "800 Gbps" its network.

    Raises:
        SkippedRecordError: no GPU, or one without shipped facts.
    """
    words = text(record, "gpu", "hardware")
    memory = count(record, "gpu_mem_gb")
    name = _device_name(words, memory)
    device = hardware.device(name)
    node = hardware.node_defaults(name)
    stated = re.search(r"(\d+)\s*/\s*node", words)
    per_node = min(num_gpus, int(stated.group(1)) if stated else node.devices)
    nodes = -(-num_gpus // per_node)
    inter, rails = node.inter, node.rails_for(per_node)
    speed = re.search(r"(\d+)\s*gbps", words, re.IGNORECASE)
    if speed:
        inter, rails = Link(bandwidth=float(speed.group(1)) * 1e9 / 8, latency_s=inter.latency_s), 1
    return Cluster(
        name=f"{nodes}x{per_node}:{device.name}",
        device=device,
        num_nodes=nodes,
        devices_per_node=per_node,
        intra=node.intra,
        inter=inter,
        rails_per_node=rails,
        domain_size=node.domain_for(per_node),
    )


def _device_name(words: str, memory: int | None) -> str:
    """The longest beginning of a hardware description that names a shipped GPU; its memory picks the variant."""
    tokens = words.replace(",", " ").split()
    if not tokens:
        raise SkippedRecordError("record names no GPU", fix="add gpu")
    guesses = [f"{tokens[0]}-{memory}gb"] if memory else []
    guesses += ["-".join(tokens[:length]) for length in range(len(tokens), 0, -1)]
    for guess in guesses:
        try:
            return hardware.canonical_name(guess)
        except InputError:
            continue
    raise SkippedRecordError(f"unknown GPU {words[:40]!r}", fix="use a shipped device's name")
