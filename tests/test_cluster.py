"""``--cluster``: short forms, shipped clusters, files; every fault named with file and key; never a traceback."""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from uniap_tune import hardware, units
from uniap_tune.adapters.cluster import describe, read_cluster, shipped_clusters
from uniap_tune.adapters.documents import MAX_BYTES
from uniap_tune.errors import ExitCode, InputError
from uniap_tune.spec import Cluster, DType
from uniap_tune.units import GIB

REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "cluster.md"
EXAMPLE = re.findall(r"```yaml\n(.*?)```", REFERENCE.read_text(encoding="utf-8"), re.DOTALL)[1]


def write(folder: Path, text: str, name: str = "cluster.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_cluster(source)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- short forms and shipped clusters


def test_nodes_times_devices() -> None:
    cluster = read_cluster("8x8:h100")
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.num_devices) == (8, 8, 64)
    assert cluster.device == hardware.device("h100")
    assert cluster.name == "8x8:h100-sxm"
    assert cluster.rails_per_node * cluster.inter.bandwidth == 8 * 400e9 / 8
    assert cluster.fast_domain == 8
    assert cluster.memory_fraction is None


@pytest.mark.parametrize("text", ["8X8:H100", " 8x8:h100 ", "8×8:h100", "08x8: h100"])
def test_spellings_of_the_short_form(text: str) -> None:
    assert read_cluster(text) == read_cluster("8x8:h100")


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"), [("8:h100", 1, 8), ("4:h100", 1, 4), ("64:h100", 8, 8), ("8:gb200", 2, 4)]
)
def test_devices_in_usual_nodes(text: str, nodes: int, per_node: int) -> None:
    cluster = read_cluster(text)
    assert (cluster.num_nodes, cluster.devices_per_node) == (nodes, per_node)


def test_half_a_node_has_half_the_rails() -> None:
    assert read_cluster("2x4:h100").rails_per_node == 4
    assert read_cluster("2x1:v100").rails_per_node == 1


def test_the_nvlink_domain_of_a_rack() -> None:
    assert read_cluster("18x4:gb200").fast_domain == 72


def test_environments_of_the_paper() -> None:
    a, b, c, d = (read_cluster(f"env-{letter}") for letter in "abcd")
    assert [cluster.name for cluster in (a, b, c, d)] == list(shipped_clusters())
    assert [(cluster.num_nodes, cluster.devices_per_node) for cluster in (a, b, c, d)] == [
        (1, 8),
        (2, 4),
        (1, 8),
        (4, 4),
    ]
    assert [cluster.device.name for cluster in (a, b, c)] == ["v100-32gb", "titan-xp", "a100-40gb-pcie"]
    assert b.device == d.device
    for cluster in (b, d):
        assert cluster.inter.bandwidth * cluster.rails_per_node == 10e9 / 8
    assert read_cluster("ENV-A") == a


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0x8:h100", "'0' is not a count"),
        ("8x0:h100", "'0' is not a count"),
        ("-1x8:h100", "'-1' is not a count"),
        ("8.5x8:h100", "'8.5' is not a count"),
        ("nanx8:h100", "'nan' is not a count"),
        ("x8:h100", "'' is not a count"),
        ("²x8:h100", "is not a count"),
        ("9999999x8:h100", "is not a count"),
        ("8x9999:h100", "is not a count"),
        ("9" * 5000 + "x8:h100", "is not a count"),
        ("8x8x8:h100", "3 counts"),
        ("12:h100", "2x6:h100"),
        ("8x8", "lacks the device"),
        ("64", "lacks the device"),
        ("8x8:", "lacks the device"),
        (":h100", "is not a count"),
        ("8x8:h1000", "h100"),
        ("h100", "not a cluster"),
        ("env-e", "did you mean env-"),
        ("", "not a cluster"),
        ("\0", "not a cluster"),
        ("x" * 5000, "not a cluster"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("nowhere/cluster", "nowhere/cluster: cannot be read"),
        ("a\0b.yaml", "cannot be read"),
        ("line\nbreak.yaml", "line?break.yaml"),
    ],
)
def test_refused_texts(text: str, part: str) -> None:
    assert part in refusal(text)


# --- files


def test_the_smallest_file_is_the_short_form(tmp_path: Path) -> None:
    path = write(tmp_path, "name: 8x8:h100-sxm\nnum_nodes: 8\ndevices_per_node: 8\ndevice: H100\n")
    assert read_cluster(path) == read_cluster(str(path)) == read_cluster("8x8:h100")


def test_the_documented_example(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, EXAMPLE))
    assert (cluster.name, cluster.num_nodes, cluster.devices_per_node) == ("our-h100s", 16, 8)
    assert (cluster.device.name, cluster.device.generation) == ("h100-sxm-96gb", "hopper")
    assert cluster.device.memory_bytes == 94.5 * GIB
    assert cluster.device.memory_bandwidth == pytest.approx(3.35e12)
    assert cluster.device.peak_flops[DType.FP8] == pytest.approx(1978.9e12)
    assert cluster.device.peak_flops[DType.FP32] == hardware.device("h100").peak_flops[DType.FP32]
    assert (cluster.intra.bandwidth, cluster.intra.latency_s) == (450e9, 3.4e-6)
    assert (cluster.inter.bandwidth, cluster.inter.latency_s) == (50e9, pytest.approx(14e-6))
    assert (cluster.rails_per_node, cluster.domain_size, cluster.memory_fraction) == (8, 8, 0.92)


TOML_EXAMPLE = """
name = "our-h100s"
num_nodes = 16
devices_per_node = 8
rails_per_node = 8
domain_size = 8
memory_fraction = 0.92
[device]
base = "h100"
name = "h100-sxm-96gb"
memory = "94.5 GiB"
memory_bandwidth = 3.35e12
num_sms = 132
generation = "hopper"
vendor = "nvidia"
source = "datasheet of our vendor"
[device.peak_flops]
bf16 = "989.4 TFLOP/s"
fp16 = 989.4e12
fp8 = "1978.9 TFLOPS"
[intra]
bandwidth = "450 GB/s"
latency = 3.4e-6
[inter]
bandwidth = "400 Gb/s"
latency = "14us"
"""


def test_toml_says_the_same_as_yaml(tmp_path: Path) -> None:
    yaml, toml = write(tmp_path, EXAMPLE), write(tmp_path, TOML_EXAMPLE, "cluster.toml")
    assert describe(read_cluster(toml)) == describe(read_cluster(yaml))


def test_single_facts_are_overridden(tmp_path: Path) -> None:
    base = "num_nodes: 2\ndevices_per_node: 8\n"
    plain = read_cluster(write(tmp_path, f"{base}device: h100\n"))
    slow = read_cluster(write(tmp_path, f"{base}device: h100\ninter: {{bandwidth: 25 GB/s}}\n"))
    assert slow.inter.bandwidth == 25e9
    assert slow.inter.latency_s == plain.inter.latency_s
    assert slow.device == plain.device
    small = read_cluster(write(tmp_path, f"{base}device: {{base: h100, memory: 40 GB}}\n"))
    assert small.device.memory_bytes == 40e9
    assert small.device.peak_flops == plain.device.peak_flops


SCRATCH = """
num_nodes: 2
devices_per_node: 4
device: {memory: 40 GiB, memory_bandwidth: 1.6 TB/s, num_sms: 100, peak_flops: {bf16: 250 TFLOPS}}
intra: {bandwidth: 100 GB/s}
inter: {bandwidth: 100 Gb/s, latency: 0}
"""


def test_a_device_from_scratch(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, SCRATCH))
    assert cluster.device.peak_flops == {DType.BF16: 250e12}
    assert (cluster.device.generation, cluster.device.vendor) == ("generic", "unknown")
    assert cluster.intra.latency_s == 5.7e-6
    assert (cluster.inter.bandwidth, cluster.inter.latency_s) == (12.5e9, 0.0)
    assert (cluster.name, cluster.rails_per_node, cluster.fast_domain) == ("cluster", 1, 4)


@pytest.mark.parametrize("key", ["memory", "memory_bandwidth", "num_sms", "peak_flops"])
def test_a_device_from_scratch_is_described_in_full(tmp_path: Path, key: str) -> None:
    text = re.sub(rf"\b{key}: ({{.*?}}|[^,{{}}]+),? ?", "", SCRATCH)
    message = refusal(write(tmp_path, text))
    assert f"device.{key} is missing" in message


def test_a_mesh_is_inherited_and_can_be_overridden(tmp_path: Path) -> None:
    text = "num_nodes: 1\ndevices_per_node: 8\ndevice: v100\n"
    assert read_cluster(write(tmp_path, text)).intra.mesh
    assert read_cluster(write(tmp_path, text + "intra: {bandwidth: 100 GB/s}\n")).intra.mesh
    assert not read_cluster(write(tmp_path, text + "intra: {mesh: false}\n")).intra.mesh
    assert read_cluster(write(tmp_path, text.replace("v100", "h100") + "intra: {mesh: true}\n")).intra.mesh


def test_one_node_needs_no_network(tmp_path: Path) -> None:
    text = SCRATCH.replace("num_nodes: 2", "num_nodes: 1").replace("inter: {bandwidth: 100 Gb/s, latency: 0}\n", "")
    assert read_cluster(write(tmp_path, text)).num_devices == 4
    assert "inter is missing" in refusal(write(tmp_path, text.replace("num_nodes: 1", "num_nodes: 2")))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("nodes: 2", "nodes: unknown key; why: did you mean num_nodes?"),
        ("zzzz: 2", "zzzz: unknown key; why: known keys: name"),
        ("num_nodes: 0", "num_nodes: 0 is out of range"),
        ("num_nodes: -1", "num_nodes"),
        ("num_nodes: 1.5", "num_nodes: must be a whole number"),
        ("num_nodes: many", "num_nodes"),
        ("num_nodes: .nan", "num_nodes"),
        ("num_nodes: [1]", "num_nodes: must be a number"),
        ("num_nodes: 1e30", "num_nodes: 1e30 is out of range"),
        ("device: h1000", "device: unknown device 'h1000'; why: nearest names: h100"),
        ("device: [h100]", "device: must be a mapping"),
        ("device: {base: h100, memory: 0}", "device.memory: 0 is out of range"),
        ("device: {base: h100, memory: 80}", "device.memory: 80 is out of range"),
        ("device: {base: h100, memory: lots}", "device.memory: 'lots' is not a size"),
        ("device: {base: h100, memory: 1e400}", "device.memory: 1e400 is out of range"),
        (
            "device: {base: h100, memory_bandwith: 1}",
            "device.memory_bandwith: unknown key; why: did you mean memory_band",
        ),
        ("device: {base: h100, num_sms: 0}", "device.num_sms"),
        ("device: {base: h100, generation: hoper}", "device.generation: 'hoper' is unknown"),
        ("device: {base: h100, peak_flops: {fp64: 1}}", "device.peak_flops.fp64: unknown key"),
        ("device: {base: h100, peak_flops: {bf16: 989}}", "device.peak_flops.bf16: 989 is out of range"),
        ("device: {base: h100, peak_flops: 989}", "device.peak_flops: must be a mapping"),
        ("device: {base: h10000000}", "device.base: unknown device"),
        ("intra: {bandwidth: 900}", "intra.bandwidth: 900 is out of range"),
        ("intra: {bandwidth: 900 gb/s}", "900 GB/s (bytes) or 400 Gb/s (bits)"),
        ("intra: {bandwidth: -1 GB/s}", "intra.bandwidth"),
        ("intra: {latency: -1}", "intra.latency"),
        ("intra: {mesh: perhaps}", "intra.mesh: must be true or false, not perhaps"),
        ("inter: {mesh: true}", "inter.mesh: unknown key"),
        ("intra: {latency: 5}", "intra.latency: 5 is out of range"),
        ("inter: {bandwith: 1}", "inter.bandwith: unknown key; why: did you mean bandwidth?"),
        ("rails_per_node: 0", "rails_per_node: 0 is out of range"),
        ("domain_size: 3", "domain_size: 3 does not fit nodes of 8"),
        ("memory_fraction: 1.5", "memory_fraction: 1.5 is out of range"),
        ("memory_fraction: 0", "memory_fraction: 0 is out of range"),
        ("name: ''", "name: must be one line of text"),
        ('name: "a\\nb"', "name: must be one line of text"),
    ],
)
def test_refused_entries(tmp_path: Path, line: str, part: str) -> None:
    entries = {"num_nodes": "num_nodes: 2", "devices_per_node": "devices_per_node: 8", "device": "device: h100"}
    entries[line.partition(":")[0]] = line
    path = write(tmp_path, "\n".join(entries.values()))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert part in message


@pytest.mark.parametrize("key", ["num_nodes", "devices_per_node", "device"])
def test_missing_entries(tmp_path: Path, key: str) -> None:
    lines = ["num_nodes: 2", "devices_per_node: 8", "device: h100"]
    path = write(tmp_path, "\n".join(line for line in lines if not line.startswith(f"{key}:")))
    assert f"{path}: {key} is missing" in refusal(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("- a\n- b", "must be a mapping"),
        ("num_nodes: 1\nnum_nodes: 2", "line 2: duplicated key 'num_nodes'"),
        ("intra: {latency: 1, latency: 2}", "duplicated key 'latency'"),
        ("a: [", "not valid YAML; why: line"),
        ("a: \x07", "not valid YAML"),
        ("a: b: c", "not valid YAML; why: line 1"),
        ("a: &x 1\nb: *x", "anchors and aliases are not accepted"),
        ("a: *x", "anchors and aliases are not accepted"),
        ("<<: {num_nodes: 1}", "unknown key"),
        ("? [a]\n: 1", "not valid YAML"),
        ("---\na: 1\n---\nb: 2", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: " * 3 + "1", "not valid YAML"),
        ("{a: " * 100, "nested too deeply"),
        ("num_nodes: !!python/object/apply:os.getcwd []", "num_nodes: must be a number"),
        ("x" * (MAX_BYTES + 1), "larger than 64 KiB"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, part: str) -> None:
    start = time.process_time()
    assert part in refusal(write(tmp_path, text))
    assert time.process_time() - start < 2


def test_yaml_aliases_cannot_explode(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert "line 1: anchors and aliases" in refusal(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("num_nodes = ", "not valid TOML"),
        ("num_nodes = 1\nnum_nodes = 2", "not valid TOML"),
        ("a = " + "[" * 20_000, "cluster.toml: n"),
        ("num_nodes = true", "num_nodes: must be a number"),
        ("num_nodes = nan", "num_nodes: nan is out of range"),
        ("num_nodes = inf", "num_nodes: inf is out of range"),
        ("num_nodes = 2024-01-01", "num_nodes: must be a number"),
        ("num_nodes = 0x" + "f" * 6000, "num_nodes"),
        ("num_nodes = " + "9" * 6000, "not valid TOML"),
        ("num_nodes = 2\ndevices_per_node = 2\ndevice = 0x" + "f" * 6000, "device: must be a mapping"),
        ("num_nodes = 2\ndevices_per_node = 2\ndevice = 'h100'\nname = 0x" + "f" * 6000, "name: must be one line"),
    ],
)
def test_refused_toml(tmp_path: Path, text: str, part: str) -> None:
    assert part in refusal(write(tmp_path, text, "cluster.toml"))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)
    binary = tmp_path / "cluster.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary}: not UTF-8 text" in refusal(binary)


def test_any_existing_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, EXAMPLE, "ours")
    monkeypatch.chdir(tmp_path)
    assert read_cluster("ours").name == "our-h100s"


# --- describe


@pytest.mark.parametrize("text", ["8x8:h100", "18x4:gb200", "1x1:titan-xp", *shipped_clusters()])
def test_a_description_is_a_cluster_file(tmp_path: Path, text: str) -> None:
    cluster = read_cluster(text)
    path = write(tmp_path, json.dumps(describe(cluster)), "plan.json")
    assert read_cluster(path) == cluster


def test_a_description_keeps_the_margin(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, EXAMPLE))
    assert describe(cluster)["memory_fraction"] == 0.92
    assert read_cluster(write(tmp_path, json.dumps(describe(cluster)))) == cluster


def test_descriptions_are_deterministic() -> None:
    assert json.dumps(describe(read_cluster("8x8:h100"))) == json.dumps(describe(read_cluster("8x8:H100")))


# --- units


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("900 GB/s", 900e9),
        ("400 Gb/s", 50e9),
        ("400Gbps", 50e9),
        ("10 Gbit/s", 1.25e9),
        ("1.8TB/s", 1.8e12),
        ("5e9", 5e9),
        ("900", 900),
    ],
)
def test_bandwidths(text: str, value: float) -> None:
    assert units.parse_bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["900 gb/s", "900 GB", "fast", "-1 GB/s", "1 mb/s", "٣ GB/s"])
def test_doubtful_bandwidths(text: str) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        units.parse_bandwidth(text)


@pytest.mark.parametrize(
    ("text", "value"), [("3.4 us", 3.4e-6), ("3.4µs", 3.4e-6), ("0.2 ms", 2e-4), ("7ns", 7e-9), ("1", 1)]
)
def test_times(text: str, value: float) -> None:
    assert units.parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("989.4 TFLOPS", 989.4e12), ("1 PFLOP/s", 1e15), ("312e12", 312e12)])
def test_rates_of_arithmetic(text: str, value: float) -> None:
    assert units.parse_flops(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5 TB/s", "5 tflops", ""])
def test_doubtful_rates_of_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        units.parse_flops(text)


# --- fuzz: a cluster or an InputError on one line, nothing else


def answer(source: str | Path) -> Cluster | None:
    try:
        return read_cluster(source)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 2000
    return None


@given(st.text() | st.from_regex(r"[0-9x]{0,4}x?[0-9-]{0,3}:?[a-z0-9 -]{0,9}", fullmatch=True))
@example("8x8:\ud800")
@example("\ud800.yaml")
@example("/")
@example("/dev/null")
def test_any_text(text: str) -> None:
    cluster = answer(text)
    assert cluster is None or cluster.num_devices > 0


@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    suffix, text = data.draw(st.sampled_from([(".yaml", EXAMPLE), (".yaml", SCRATCH), (".toml", TOML_EXAMPLE)]))
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        stop = data.draw(st.integers(start, min(len(raw), start + 12)))
        raw[start:stop] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"&a ", b"*a", b"{", b"- ", b"\n", b"!!int "])
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cluster{suffix}"
        path.write_bytes(raw)
        answer(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(
    ["name", "num_nodes", "devices_per_node", "device", "base", "memory", "peak_flops", "bf16", "intra", "inter",
     "bandwidth", "latency", "rails_per_node", "domain_size", "memory_fraction", "num_sms", "memory_bandwidth", "x"]
)  # fmt: skip
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6))


@given(st.dictionaries(KEYS, TREES, max_size=8))
def test_any_structure(entries: dict[str, object]) -> None:
    document = {"num_nodes": 2, "devices_per_node": 4, "device": "h100"} | entries
    with tempfile.TemporaryDirectory() as folder:
        cluster = answer(write(Path(folder), json.dumps(document)))
    if cluster is not None:
        assert cluster.num_devices > 0
        assert 0 < cluster.inter.bandwidth < float("inf")
