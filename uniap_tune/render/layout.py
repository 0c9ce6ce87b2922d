"""How Megatron is told which pipeline stage holds how many transformer layers.

The embedding is always on the first stage and the loss on the last. The shortest correct expression is taken: nothing
for an even split, or the number of virtual stages; the counts of the first and last stage where those suffice; else the
string of ``--pipeline-model-parallel-layout`` (``parse_str_to_list`` of megatron-core's
pipeline_parallel_layer_layout.py), whose k-th stage is virtual stage k, on pipeline stage k modulo pp.
"""

from __future__ import annotations

from collections.abc import Sequence

from uniap_tune.render.shell import Arguments


def pipeline_arguments(counts: Sequence[int], mtp_layers: int = 0, virtual_stages: int = 1) -> Arguments:
    """The arguments for a split of the transformer layers.

    Args:
        counts: transformer layers of each stage, or virtual stage; those with none are legal.
        mtp_layers: multi-token-prediction layers, which stay with the loss.
        virtual_stages: model chunks on each stage.
    """
    pp = len(counts) // virtual_stages
    arguments: dict[str, str | int] = {"--pipeline-model-parallel-size": pp}
    is_even = len(set(counts)) == 1
    if virtual_stages > 1 and is_even:
        return arguments | {"--num-virtual-stages-per-pipeline-rank": virtual_stages}
    if virtual_stages > 1:
        return arguments | {"--pipeline-model-parallel-layout": layout_string(counts, mtp_layers)}
    if is_even:
        return arguments
    first, last, middle = counts[0], counts[-1], counts[1:-1]
    if first and last and len(set(middle)) <= 1:
        share = middle[0] if middle else last
        if first != share:
            arguments["--decoder-first-pipeline-num-layers"] = first
        if last != share:
            arguments["--decoder-last-pipeline-num-layers"] = last
        return arguments
    arguments["--pipeline-model-parallel-layout"] = layout_string(counts, mtp_layers)
    return arguments


def layout_string(counts: Sequence[int], mtp_layers: int = 0) -> str:
    """The layout of these stages in the grammar of ``parse_str_to_list``, as short as repetition makes it.

    ``[7, 9, 9, 7]`` is ``"Et*7|(t*9|)*2t*7L"``.
    """
    *stages, last = [_repeat("t", count) for count in counts]
    return _shortest(["E", *(f"{stage}|" for stage in stages), last + "m" * mtp_layers + "L"])


def _repeat(symbol: str, times: int) -> str:
    written_out = symbol * times
    short = f"{symbol}*{times}"
    return short if len(short) < len(written_out) else written_out


def _shortest(parts: Sequence[str]) -> str:
    """The shortest text that expands to ``parts``, with ``(…)*n`` for repeated groups; the grammar nests none."""
    best = [""] * (len(parts) + 1)
    for start in range(len(parts) - 1, -1, -1):
        options = [parts[start] + best[start + 1]]
        for width in range(1, (len(parts) - start) // 2 + 1):
            group = parts[start : start + width]
            end = start + width
            while parts[end : end + width] == group:
                end += width
                text = f"({''.join(group)})*{(end - start) // width}"
                options.append(text + best[end])
        best[start] = min(options, key=len)
    return best[0]
