"""How Megatron is told which pipeline stage holds how many transformer layers.

The embedding is always on the first stage and the loss on the last. The shortest correct expression is taken: nothing
for an even split, the counts of the first and last stage where those suffice, else the string of
``--pipeline-model-parallel-layout`` (``parse_str_to_list`` of megatron-core's pipeline_parallel_layer_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from uniap_tune.render.shell import Arguments


def pipeline_arguments(counts: Sequence[int], mtp_layers: int = 0) -> Arguments:
    """The arguments for a split of the transformer layers.

    Args:
        counts: transformer layers of each stage; stages with none are legal.
        mtp_layers: multi-token-prediction layers, which stay with the loss.
    """
    pp = len(counts)
    arguments: dict[str, str | int] = {"--pipeline-model-parallel-size": pp}
    if len(set(counts)) == 1:
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
    stages = [_repeat("t", count) for count in counts]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * mtp_layers + "L"
    return _shortest([f"{stage}|" for stage in stages[:-1]] + stages[-1:])


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
