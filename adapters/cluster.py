"""What you have: ``--cluster`` as a short form, a shipped name, or a YAML or TOML file, read into a Cluster.

The file format and its defaults are documented in ``docs/reference/cluster.md``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from uniap_tune import hardware, units
from uniap_tune.errors import InputError
from uniap_tune.spec import Cluster, Device, DType, Link

from .documents import parse_toml, printable, read_document

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_FORMS = "8x8:h100 (nodes x devices per node : device), 8:h100, a shipped cluster such as env-a, or a YAML or TOML file"
_GENERIC = "generic"  # efficiency constants of no generation in particular
_MAX_NODES = 1_000_000
_MAX_DEVICES_PER_NODE = 1024

_CLUSTER_KEYS = (
    "name", "num_nodes", "devices_per_node", "device", "intra", "inter", "rails_per_node", "domain_size",
    "memory_fraction",
)  # fmt: skip
_DEVICE_KEYS = (
    "base", "name", "vendor", "generation", "memory", "memory_bandwidth", "num_sms", "watts", "host",
    "peak_flops", "source",
)  # fmt: skip
_LINK_KEYS = ("bandwidth", "latency")
_INTRA_KEYS = (*_LINK_KEYS, "mesh")

# What NCCL assumes for a step of a ring (src/graph/tuning.cc, hwLat, ring/Simple): PCI 5.7 us, network 14.0 us. They
# stand in for latencies that the description of a device from scratch leaves out.
_DEFAULT_INTRA_LATENCY_S = 5.7e-6
_DEFAULT_INTER_LATENCY_S = 14.0e-6


def read_cluster(text: str | Path) -> Cluster:
    """The cluster that ``--cluster TEXT`` means.

    Args:
        text: ``8x8:h100`` (nodes x devices per node : device); ``16:h100`` (devices in nodes of the usual size); the
            name of a shipped cluster (:func:`shipped_clusters`); or the path of a YAML or TOML file.

    Raises:
        InputError: none of these, or a file with a wrong, missing or unknown entry; names file and key.
    """
    if isinstance(text, Path) or text.lower().endswith(_SUFFIXES) or "/" in text:
        path = Path(text)
        return _from_table(_Table(printable(str(path)), "", read_document(path)), path.stem)
    name = text.strip().lower()
    if name in shipped_clusters():
        document = resources.files("uniap_tune.data").joinpath("clusters", f"{name}.toml").read_text(encoding="utf-8")
        return _from_table(_Table(name, "", parse_toml(document, name)), name)
    if ":" in text:
        return _from_short_form(text.strip())
    if _is_file(text):
        return read_cluster(Path(text))
    raise InputError(f"--cluster {text[:60]!r}: not a cluster", why=_missing_part(name), fix=f"write {_FORMS}")


def cluster_from_dict(entries: Mapping[str, object], where: str) -> Cluster:
    """The cluster that :func:`describe` has put into a document; ``where`` names it in errors.

    Raises:
        InputError: a wrong, missing or unknown entry; names document and key.
    """
    return _from_table(_Table(where, "", entries), "cluster")


def shipped_clusters() -> tuple[str, ...]:
    """Names of the clusters that ship with the package."""
    folder = resources.files("uniap_tune.data").joinpath("clusters")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def describe(cluster: Cluster) -> dict[str, object]:
    """The cluster as JSON-ready data in the keys of a cluster file; reading it back gives an equal cluster.

    Sizes are bytes, FLOP/s, bytes/s and seconds.
    """
    device = cluster.device
    entries: dict[str, object] = {
        "name": cluster.name,
        "num_nodes": cluster.num_nodes,
        "devices_per_node": cluster.devices_per_node,
        "device": {
            "name": device.name,
            "vendor": device.vendor,
            "generation": device.generation,
            "memory": device.memory_bytes,
            "memory_bandwidth": device.memory_bandwidth,
            "num_sms": device.num_sms,
            **({} if device.watts is None else {"watts": device.watts}),
            **({} if device.host == 1.0 else {"host": device.host}),
            "peak_flops": {dtype.value: device.peak_flops[dtype] for dtype in DType if dtype in device.peak_flops},
            "source": device.source,
        },
        "intra": {
            "bandwidth": cluster.intra.bandwidth,
            "latency": cluster.intra.latency_s,
            **({"mesh": True} if cluster.intra.mesh else {}),
        },
        "inter": {"bandwidth": cluster.inter.bandwidth, "latency": cluster.inter.latency_s},
        "rails_per_node": cluster.rails_per_node,
    }
    if cluster.domain_size is not None:
        entries["domain_size"] = cluster.domain_size
    if cluster.memory_fraction is not None:
        entries["memory_fraction"] = cluster.memory_fraction
    return entries


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL byte
        return False


def _missing_part(name: str) -> str:
    if name and all(part.isdigit() for part in name.split("x")):
        return "it lacks the device"
    near = difflib.get_close_matches(name[:40], shipped_clusters(), n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else "there is no such file and no shipped cluster of that name"


def _from_short_form(text: str) -> Cluster:
    where = f"--cluster {text[:60]!r}"
    shape, _, device_name = text.partition(":")
    if not device_name.strip():
        raise InputError(f"{where}: it lacks the device", fix=f"write {_FORMS}")
    device = _shipped_device(device_name, where)
    defaults = hardware.node_defaults(device.name)
    counts = shape.lower().replace("×", "x").split("x")
    if len(counts) > 2:
        raise InputError(f"{where}: {len(counts)} counts before the device", fix=f"write {_FORMS}")
    limits = (_MAX_NODES, _MAX_DEVICES_PER_NODE) if len(counts) == 2 else (_MAX_NODES,)
    numbers = [_count(part, where, limit) for part, limit in zip(counts, limits, strict=True)]
    if len(numbers) == 2:
        num_nodes, per_node = numbers
    else:
        per_node = min(numbers[0], defaults.devices)
        num_nodes, rest = divmod(numbers[0], per_node)
        if rest:
            share = next(size for size in range(per_node, 0, -1) if numbers[0] % size == 0)
            raise InputError(
                f"{where}: {numbers[0]} devices do not fill nodes of {per_node}",
                fix=f"say how many are in a node, as in {numbers[0] // share}x{share}:{device.name}",
            )
    return _cluster(f"{num_nodes}x{per_node}:{device.name}", device, num_nodes, per_node, defaults)


def _cluster(name: str, device: Device, num_nodes: int, per_node: int, defaults: hardware.NodeDefaults) -> Cluster:
    return Cluster(
        name=name,
        device=device,
        num_nodes=num_nodes,
        devices_per_node=per_node,
        intra=defaults.intra,
        inter=defaults.inter,
        rails_per_node=defaults.rails_for(per_node),
        domain_size=defaults.domain_for(per_node),
    )


def _count(text: str, where: str, limit: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= limit:
        raise InputError(
            f"{where}: {text[:20]!r} is not a count from 1 to {limit}",
            fix="write nodes x devices per node : device, as in 8x8:h100",
        )
    return int(text)


def _shipped_device(name: str, where: str) -> Device:
    try:
        return hardware.device(name)
    except InputError as error:
        raise InputError(f"{where}: {error.what}", why=error.why, fix=error.fix) from None


@dataclass(frozen=True, slots=True)
class _Table:
    """A mapping of a file, with the place to name in errors."""

    file: str
    prefix: str
    entries: Mapping[str, object]

    def where(self, key: str) -> str:
        return f"{self.file}: {self.prefix}{key}"

    def check_keys(self, known: Collection[str]) -> None:
        for key in self.entries:
            if key not in known:
                near = difflib.get_close_matches(key[:40], known, n=1, cutoff=0.5)
                why = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(known)
                raise InputError(f"{self.where(_shown(key[:40]))}: unknown key", why=why, fix="correct or remove it")

    def missing(self, key: str, why: str) -> InputError:
        return InputError(f"{self.where(key)} is missing", why=why, fix=f"add {key}")

    def text(self, key: str) -> str | None:
        value = self.entries.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or len(value) > 500 or not value.isprintable():
            raise InputError(f"{self.where(key)}: must be one line of text, not {_shown(value)}", fix="correct it")
        return value.strip()

    def number(self, key: str, parse: Callable[[str], float], low: float, high: float) -> float | None:
        """The value in base units, between ``low`` and ``high``; ``None`` when the key is absent."""
        value = self.entries.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise InputError(f"{self.where(key)}: must be a number with or without a unit, not {_shown(value)}")
        try:
            number = parse(value) if isinstance(value, str) else float(value)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{self.where(key)}: {_shown(str(error))}", fix="correct it, or write its unit") from None
        if not (math.isfinite(number) and low <= number <= high):
            raise InputError(
                f"{self.where(key)}: {_shown(value)} is out of range",
                why=f"in base units it must be from {low:g} to {high:g}",
                fix="correct it, or write its unit",
            )
        return number

    def integer(self, key: str, high: int) -> int | None:
        number = self.number(key, float, 1, high)
        if number is not None and not number.is_integer():
            raise InputError(f"{self.where(key)}: must be a whole number, not {number:g}", fix="correct it")
        return None if number is None else int(number)

    def flag(self, key: str) -> bool | None:
        value = self.entries.get(key)
        if value is None:
            return None
        if str(value).lower() not in ("true", "false"):  # YAML scalars are read as text
            raise InputError(f"{self.where(key)}: must be true or false, not {_shown(value)}", fix="correct it")
        return str(value).lower() == "true"

    def table(self, key: str) -> _Table | None:
        value = self.entries.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{self.where(key)}: must be a mapping of keys to values, not {_shown(value)}")
        return _Table(self.file, f"{self.prefix}{key}.", value)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return printable(value[:120])
    # repr refuses integers of thousands of digits
    small = isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if small else type(value).__name__


def _from_table(table: _Table, stem: str) -> Cluster:
    table.check_keys(_CLUSTER_KEYS)
    num_nodes = table.integer("num_nodes", _MAX_NODES)
    per_node = table.integer("devices_per_node", _MAX_DEVICES_PER_NODE)
    if num_nodes is None or per_node is None:
        key = "num_nodes" if num_nodes is None else "devices_per_node"
        raise table.missing(key, "the size of the cluster must be given")
    device, defaults = _device(table)
    intra = _link(table, "intra", defaults.intra if defaults else None, _DEFAULT_INTRA_LATENCY_S)
    inter_default = defaults.inter if defaults else None
    if num_nodes == 1 and inter_default is None:
        inter_default = replace(intra, mesh=False)  # never used by one node
    inter = _link(table, "inter", inter_default, _DEFAULT_INTER_LATENCY_S)
    rails = table.integer("rails_per_node", _MAX_DEVICES_PER_NODE)
    domain = table.integer("domain_size", _MAX_NODES * _MAX_DEVICES_PER_NODE)
    if domain is not None and domain % per_node and per_node % domain:
        raise InputError(
            f"{table.where('domain_size')}: {domain} does not fit nodes of {per_node} devices",
            why="it neither divides devices_per_node nor is a multiple of it",
            fix="give whole nodes, or an equal share of a node",
        )
    return Cluster(
        name=table.text("name") or stem,
        device=device,
        num_nodes=num_nodes,
        devices_per_node=per_node,
        intra=intra,
        inter=inter,
        rails_per_node=rails or (defaults.rails_for(per_node) if defaults else 1),
        domain_size=domain or (defaults.domain_for(per_node) if defaults else None),
        memory_fraction=table.number("memory_fraction", float, 0.01, 1.0),
    )


def _device(table: _Table) -> tuple[Device, hardware.NodeDefaults | None]:
    """The device, and the links it usually has where it is a shipped one."""
    entry = table.entries.get("device")
    if isinstance(entry, str):
        shipped = _shipped_device(entry, table.where("device"))
        return shipped, hardware.node_defaults(shipped.name)
    entries = table.table("device")
    if entries is None:
        raise table.missing("device", "a shipped device's name, or a mapping that describes one")
    entries.check_keys(_DEVICE_KEYS)
    base_name = entries.text("base")
    base = _shipped_device(base_name, entries.where("base")) if base_name else None
    return _described_device(entries, base), hardware.node_defaults(base.name) if base else None


def _described_device(entries: _Table, base: Device | None) -> Device:
    given = {
        "name": entries.text("name"),
        "vendor": entries.text("vendor"),
        "generation": _generation(entries),
        "memory_bytes": entries.number("memory", units.parse_bytes, 2.0**28, 2.0**44),
        "memory_bandwidth": entries.number("memory_bandwidth", units.parse_bandwidth, 1e9, 1e15),
        "num_sms": entries.integer("num_sms", 100_000),
        "watts": entries.number("watts", float, 10.0, 10_000.0),
        "host": entries.number("host", float, 0.1, 10.0),
        "source": entries.text("source"),
    }
    facts: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    peaks = _peak_flops(entries)
    if base is not None:
        return replace(base, peak_flops={**base.peak_flops, **peaks}, **facts)
    for key, value in (
        ("memory", given["memory_bytes"]),
        ("memory_bandwidth", given["memory_bandwidth"]),
        ("num_sms", given["num_sms"]),
        ("peak_flops", peaks),
    ):
        if not value:
            raise entries.missing(key, "a device without base must be described in full")
    generation = facts.get("generation", _GENERIC)
    vendor = hardware.generations().get(generation, "unknown")
    return Device(**({"name": "custom", "vendor": vendor, "generation": generation} | facts), peak_flops=peaks)


def _generation(entries: _Table) -> str | None:
    generation = entries.text("generation")
    known = (*hardware.generations(), _GENERIC)
    if generation is not None and generation not in known:
        raise InputError(
            f"{entries.where('generation')}: {_shown(generation)!r} is unknown",
            why="it names the efficiency constants to use: " + ", ".join(known),
            fix="give the nearest of these",
        )
    return generation


def _peak_flops(entries: _Table) -> dict[DType, float]:
    table = entries.table("peak_flops")
    if table is None:
        return {}
    table.check_keys([dtype.value for dtype in DType])
    rates = {dtype: table.number(dtype.value, units.parse_flops, 1e9, 1e19) for dtype in DType}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


def _link(table: _Table, key: str, default: Link | None, default_latency_s: float) -> Link:
    entries = table.table(key)
    if entries is None:
        if default is None:
            raise table.missing(key, "only shipped devices have a usual link")
        return default
    entries.check_keys(_INTRA_KEYS if key == "intra" else _LINK_KEYS)
    bandwidth = entries.number("bandwidth", units.parse_bandwidth, 1e6, 1e15)
    latency = entries.number("latency", units.parse_seconds, 0.0, 1.0)
    if bandwidth is None:
        if default is None:
            raise entries.missing("bandwidth", "only shipped devices have a usual link")
        bandwidth = default.bandwidth
    if latency is None:
        latency = default.latency_s if default else default_latency_s
    mesh = entries.flag("mesh")
    if mesh is None:
        mesh = default.mesh if default else False
    return Link(bandwidth=bandwidth, latency_s=latency, mesh=mesh)
