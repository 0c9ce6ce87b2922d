"""Facts of accelerators and of the nodes they come in, shipped with the package.

The figures and their sources are in ``uniap_tune/data/devices.toml``. A short name means the version with the most
memory on the fastest link: ``a100`` is the 80 GB SXM module, ``v100`` the 32 GB one, ``h100`` the SXM module.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.spec import Device, DType, Link

# FlashAttention-2 and cuDNN's fused attention need Ampere (their release notes).
_WITHOUT_FUSED_ATTENTION = ("pascal", "volta", "turing")
_VENDOR_WORDS = re.compile(r"^(nvidia|amd|instinct|tesla|geforce|radeon)-")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDefaults:
    """The node a device usually comes in.

    Attributes:
        devices: devices of a node.
        intra: link of one device inside the node (or NVLink domain).
        inter: one network rail.
        rails: network rails of a node of ``devices`` devices.
        domain_size: devices in reach of ``intra`` where that is more than a node, else ``None``.
        source: where the figures are printed.
    """

    devices: int
    intra: Link
    inter: Link
    rails: int
    domain_size: int | None
    source: str

    def rails_for(self, devices_per_node: int) -> int:
        """Rails of a node with ``devices_per_node`` devices: the usual share of a rail per device, at least one."""
        return max(1, self.rails * devices_per_node // self.devices)

    def domain_for(self, devices_per_node: int) -> int | None:
        """NVLink domain, in whole nodes, of nodes with ``devices_per_node`` devices; ``None``: the node itself."""
        if self.domain_size is None:
            return None
        return max(1, self.domain_size // devices_per_node) * devices_per_node


def device(name: str) -> Device:
    """The shipped device called ``name``: a canonical name, an alias, or the name a driver reports, in any case.

    Raises:
        InputError: no such device; the message has the nearest names.
    """
    return devices()[canonical_name(name)]


def node_defaults(name: str) -> NodeDefaults:
    """Links and network of the node in which the device called ``name`` usually comes.

    Raises:
        InputError: no such device.
    """
    return _nodes()[_tables()["devices"][canonical_name(name)]["node"]]


def canonical_name(name: str) -> str:
    """The name under which :func:`devices` has the device that is also called ``name``.

    Raises:
        InputError: no such device.
    """
    key = _normalized(name)
    names = _names()
    if key in names:
        return names[key]
    near = difflib.get_close_matches(key[:40], names, n=3, cutoff=0.5)
    known = ", ".join(near) if near else ", ".join(devices())
    raise InputError(
        f"unknown device {name[:40]!r}",
        why=("nearest names: " if near else "known devices: ") + known,
        fix="use one of these names, or describe the device in a cluster file",
    )


@cache
def devices() -> Mapping[str, Device]:
    """All shipped devices by canonical name, in the order of the data file."""
    return MappingProxyType({name: _device(name, table) for name, table in _tables()["devices"].items()})


@cache
def generations() -> Mapping[str, str]:
    """The known device generations, each with its vendor."""
    return MappingProxyType({entry.generation: entry.vendor for entry in devices().values()})


def _normalized(name: str) -> str:
    key = re.sub(r"[\s_-]+", "-", name.strip().lower())
    while match := _VENDOR_WORDS.match(key):
        key = key[match.end() :]
    return key


@cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(resources.files("uniap_tune.data").joinpath("devices.toml").read_text(encoding="utf-8"))


@cache
def _names() -> Mapping[str, str]:
    tables = _tables()["devices"]
    return {name: name for name in tables} | {alias: name for name in tables for alias in tables[name]["aliases"]}


def _device(name: str, table: dict[str, Any]) -> Device:
    return Device(
        name=name,
        vendor=table["vendor"],
        generation=table["generation"],
        memory_bytes=float(table["memory_bytes"]),
        memory_bandwidth=table["memory_gbps"] * 1e9,
        peak_flops={dtype: table["peak_tflops"][dtype] * 1e12 for dtype in DType if dtype in table["peak_tflops"]},
        num_sms=table["num_sms"],
        watts=float(table["watts"]),
        host=float(table.get("host", 1.0)),
        source=f"{table['source']}; memory {table['memory_note']}",
    )


@cache
def _nodes() -> Mapping[str, NodeDefaults]:
    return {
        name: NodeDefaults(
            devices=table["devices"],
            intra=Link(
                bandwidth=table["intra_gbps"] * 1e9, latency_s=table["intra_latency_s"], mesh=table.get("mesh", False)
            ),
            inter=Link(bandwidth=table["rail_gbps"] * 1e9, latency_s=table["inter_latency_s"]),
            rails=table["rails"],
            domain_size=table.get("domain"),
            source=table["source"],
        )
        for name, table in _tables()["nodes"].items()
    }


def has_fused_attention(device: Device) -> bool:
    """Whether there are fused attention kernels for a device, so that it need not keep its scores."""
    return device.generation not in _WITHOUT_FUSED_ATTENTION
