"""Units: everything inside is seconds, bytes, FLOP and bytes/s; here they are written for people and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_BINARY = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_DECIMAL = {"k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12}
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Gi": float(GIB)}
_BYTE_RATES = {f"{prefix}{unit}": factor for prefix, factor in _PREFIXES.items() for unit in ("B/s", "Bps")}
_BIT_RATES = {f"{prefix}{unit}": factor / 8 for prefix, factor in _PREFIXES.items() for unit in ("b/s", "bps", "bit/s")}
_FLOP_RATES = {
    f"{prefix}{unit}": factor for prefix, factor in _PREFIXES.items() for unit in ("FLOPS", "FLOP/s", "FLOPs/s")
}
_PER_SECOND = {"": 1.0, "s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "μs": 1e6, "ns": 1e9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([a-zA-Z/µμ]*)\s*\Z", re.ASCII)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*\Z")


def parse_bytes(text: str) -> float:
    """``"80GiB"``, ``"80 GB"`` or ``"8.5e10"`` in bytes. Binary units end in ``iB``, decimal ones do not.

    Raises:
        ValueError: when the text is not a size.
    """
    match = _SIZE.match(text)
    unit = match.group(2).lower() if match else ""
    factor = _BINARY.get(unit, _DECIMAL.get(unit))
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size such as 80GiB, 80GB or 85899345920")
    return float(match.group(1)) * factor


def parse_bandwidth(text: str) -> float:
    """``"400 Gb/s"`` (bits) or ``"900 GB/s"`` (bytes) in bytes/s; a bare number is bytes/s.

    The case of the ``b`` is the only thing that tells bits from bytes, so here it counts.

    Raises:
        ValueError: when the text is not a bandwidth.
    """
    units = {"": 1.0} | _BYTE_RATES | _BIT_RATES
    number, factor = _quantity(text, units, "a bandwidth such as 900 GB/s (bytes) or 400 Gb/s (bits)")
    return number * factor


def parse_flops(text: str) -> float:
    """``"989.4 TFLOPS"`` or ``"989.4e12"`` in FLOP/s.

    Raises:
        ValueError: when the text is not a rate of arithmetic.
    """
    number, factor = _quantity(text, {"": 1.0} | _FLOP_RATES, "a rate such as 989.4 TFLOPS or 989.4e12")
    return number * factor


def parse_seconds(text: str) -> float:
    """``"5 us"`` or ``"5e-6"`` in seconds.

    Raises:
        ValueError: when the text is not a time.
    """
    number, per_second = _quantity(text, _PER_SECOND, "a time such as 5 us, 0.2 ms or 5e-6")
    return number / per_second  # the factor is exact, so this rounds once


def _quantity(text: str, units: Mapping[str, float], example: str) -> tuple[float, float]:
    match = _QUANTITY.match(text)
    if match is None or match.group(2) not in units:
        raise ValueError(f"{text!r} is not {example}")
    return float(match.group(1)), units[match.group(2)]


def format_bytes(count: float) -> str:
    """Bytes for people: ``"41.3 GiB"``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds for people: ``"3.98 s"``, ``"12.4 ms"``, ``"7.1 us"``."""
    if abs(seconds) >= 100:
        return f"{seconds:.0f} s"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us"


def format_count(count: float) -> str:
    """Large counts for people: ``"6.74B"``, ``"1.01T"``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def format_percent(fraction: float) -> str:
    """A fraction as a percentage: ``"1.8%"``."""
    return f"{fraction * 100:.1f}%"
