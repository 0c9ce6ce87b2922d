"""Shipped device facts: names, plausibility against physics and datasheets, and the tables of the reference page."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from uniap_tune import hardware
from uniap_tune.errors import ExitCode, InputError
from uniap_tune.spec import DType
from uniap_tune.units import GIB

REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "cluster.md"
TABLES: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(
    resources.files("uniap_tune.data").joinpath("devices.toml").read_text(encoding="utf-8")
)
NAMES = list(TABLES["devices"])


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("h100", "h100-sxm"),
        ("H100", "h100-sxm"),
        ("a100", "a100-80gb-sxm"),
        ("a100-80gb", "a100-80gb-sxm"),
        ("a100_80GB", "a100-80gb-sxm"),
        ("a100-40gb", "a100-40gb-sxm"),
        ("v100", "v100-32gb"),
        ("v100-16gb", "v100-16gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-SXM3-32GB", "v100-sxm3-32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("TITAN Xp", "titan-xp"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_people_and_drivers_use(name: str, canonical: str) -> None:
    assert hardware.device(name).name == canonical


def test_what_is_shipped() -> None:
    assert set(hardware.devices()) == {
        "v100-16gb", "v100-32gb", "v100-sxm3-32gb", "a100-40gb-sxm", "a100-40gb-pcie", "a100-80gb-sxm",
        "a100-80gb-pcie", "h100-sxm", "a800-sxm", "h100-pcie", "h200", "h800-sxm", "h20", "b200", "gb200", "b300",
        "gb300", "t4", "l4", "a10g", "a10", "a40", "rtx-a6000", "rtx-3090", "l40", "rtx-6000-ada", "l40s", "rtx-4090",
        "titan-xp", "mi250x", "mi300x",
    }  # fmt: skip


def test_no_name_means_two_devices() -> None:
    names = NAMES + [alias for table in TABLES["devices"].values() for alias in table["aliases"]]
    assert len(names) == len(set(names))
    for name in names:  # every name survives the normalization of lookups
        hardware.device(name)


@pytest.mark.parametrize("name", ["", "h10", "a100-60gb", "h100-sxm-extra", "x" * 10_000, "h100\0", "١٠٠"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match="unknown device") as caught:
        hardware.device(name)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert len(str(caught.value)) < 600


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(InputError, match="h100"):
        hardware.device("h1000")


@pytest.mark.parametrize("name", NAMES)
def test_plausible(name: str) -> None:
    device = hardware.device(name)
    peaks = device.peak_flops
    assert device.source
    assert hardware.node_defaults(name).source
    assert peaks[DType.FP32] <= peaks[DType.FP16]
    for narrow, wide in ((DType.FP8, DType.BF16), (DType.MXFP8, DType.BF16), (DType.NVFP4, DType.FP8)):
        if narrow in peaks:  # half the bits, twice the rate; Blackwell Ultra has three times the FP8 rate in FP4
            assert 1.98 <= peaks[narrow] / peaks[wide] <= 3.01
    assert (DType.BF16 in peaks) == (device.generation not in {"volta", "turing", "pascal"})
    assert (DType.NVFP4 in peaks) == (DType.MXFP8 in peaks) == (device.generation == "blackwell")
    # FLOP per byte of memory traffic at which a kernel becomes compute-bound
    assert 10 < peaks[DType.FP16] / device.memory_bandwidth < 500


@pytest.mark.parametrize(
    ("name", "nominal_gb"),
    [("v100-16gb", 16), ("v100-32gb", 32), ("a100-40gb-sxm", 40), ("a100-80gb-sxm", 80), ("h100-sxm", 80), ("l4", 24),
     ("l40s", 48), ("rtx-4090", 24), ("mi300x", 192), ("mi250x", 64), ("titan-xp", 12), ("t4", 16), ("a10", 24),
     ("a40", 48), ("rtx-a6000", 48), ("rtx-3090", 24), ("h20", 96), ("rtx-6000-ada", 48)],
)  # fmt: skip
def test_the_driver_leaves_a_little_less_than_the_datasheet_says(name: str, nominal_gb: int) -> None:
    assert 0.9 < hardware.device(name).memory_bytes / (nominal_gb * GIB) < 1


def test_figures_of_datasheets() -> None:
    a100, h100 = hardware.device("a100-80gb"), hardware.device("h100")
    assert a100.memory_bytes == 84987740160
    assert a100.peak_flops[DType.BF16] == pytest.approx(312e12)
    assert a100.memory_bandwidth == pytest.approx(2.039e12)
    assert h100.memory_bytes == 85024112640
    assert h100.peak_flops[DType.BF16] == pytest.approx(989.4e12)
    assert h100.num_sms == 132
    assert hardware.device("gb200").peak_flops[DType.BF16] == pytest.approx(2.5e15)


def test_nodes() -> None:
    h100, gb200, v100 = (hardware.node_defaults(name) for name in ("h100", "gb200", "v100"))
    assert (h100.intra.bandwidth, h100.rails * h100.inter.bandwidth) == (450e9, 400e9)  # 8 x 400 Gb/s
    assert (h100.devices, h100.domain_for(8)) == (8, None)
    assert (gb200.devices, gb200.domain_for(4), gb200.domain_for(8)) == (4, 72, 72)
    assert gb200.domain_for(5) == 70  # whole nodes
    assert gb200.domain_for(100) == 100
    assert [v100.rails_for(devices) for devices in (1, 4, 8, 16)] == [1, 2, 4, 8]


def test_generations_name_their_vendor() -> None:
    assert hardware.generations()["hopper"] == "nvidia"
    assert hardware.generations()["cdna3"] == "amd"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(header), "|" + "---|" * len(header), *map(_row, rows)])


def _devices_table() -> str:
    formats = ["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]
    rows = [
        [
            f"`{name}`",
            entry["generation"],
            f"{entry['memory_bytes'] / GIB:.2f} GiB",
            f"{entry['memory_gbps']:g}",
            str(entry["num_sms"]),
            str(entry["watts"]),
            *(f"{entry['peak_tflops'].get(dtype, '–')}" for dtype in formats),
            f"`{entry['node']}`",
        ]
        for name, entry in TABLES["devices"].items()
    ]
    return _table(["device", "generation", "memory", "GB/s", "SMs", "W", *formats, "node"], rows)


def _nodes_table() -> str:
    rows = [
        [
            f"`{name}`",
            str(entry["devices"]),
            str(entry.get("domain", entry["devices"])),
            f"{entry['intra_gbps']:g} GB/s, {entry['intra_latency_s'] * 1e6:g} us"
            + ", mesh" * entry.get("mesh", False),
            f"{entry['rails']} x {entry['rail_gbps'] * 8:g} Gb/s, {entry['inter_latency_s'] * 1e6:g} us",
            entry["source"],
        ]
        for name, entry in TABLES["nodes"].items()
    ]
    return _table(["node", "devices", "domain", "intra", "rails", "source"], rows)


@pytest.mark.parametrize(("marker", "expected"), [("devices", _devices_table()), ("nodes", _nodes_table())])
def test_the_reference_page_shows_the_data(marker: str, expected: str) -> None:
    page = REFERENCE.read_text(encoding="utf-8")
    shown = re.search(f"<!-- {marker} -->\n(.*?)\n?<!-- /{marker} -->", page, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == expected, f"replace the table in {REFERENCE.name} by:\n{expected}"


def test_every_node_is_used() -> None:
    assert {entry["node"] for entry in TABLES["devices"].values()} == set(TABLES["nodes"])
