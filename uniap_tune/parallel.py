"""A search spread over processes: each takes every n-th entry, and all share the incumbent.

The answer is the same as with one process: every plan within a tie of the best is found by whoever has its entry, and
the tie-break does not depend on the order. Only the bounds of what was pruned may differ.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass, replace
from typing import Any

from uniap_tune.formulate import Pricer
from uniap_tune.problem import Assignment
from uniap_tune.search import Candidate, Search, SearchOptions, SearchResult
from uniap_tune.space import Family, Space


@dataclass(frozen=True, slots=True)
class _Part:
    """What a process sends back: candidates as (pp, c, family, leading, assignment, objective), and its proofs."""

    candidates: list[tuple[int, int, Family, int, Assignment, float]]
    bounds: dict[tuple[int, int], float]
    solved: int
    pruned: int
    stopped: bool


def search_with(space: Space, pricer: Pricer, options: SearchOptions, jobs: int) -> SearchResult:
    """As :func:`uniap_tune.search.search`, in ``jobs`` processes. Needs a system that can fork."""
    context = multiprocessing.get_context("fork")
    limit = context.Value("d", math.inf)
    quiet = replace(options, notify=None)
    pipes = []
    for number in range(jobs):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(space, pricer, quiet, (number, jobs), limit, sender), daemon=True)
        worker.start()
        sender.close()
        pipes.append((worker, receiver))
    merged = Search(space, pricer, options)
    stopped = False
    for worker, receiver in pipes:
        part = _receive(receiver)
        worker.join()
        stopped |= part.stopped
        merged.solved += part.solved
        merged.pruned += part.pruned
        for pair, bound in part.bounds.items():
            merged.bounds[pair] = min(merged.bounds.get(pair, math.inf), bound)
        for pp, c, family, leading, assignment, objective in part.candidates:
            formulation = pricer.formulate(pp, c, family, leading=leading)
            merged.add(Candidate(pp, c, family, formulation, assignment, objective))
    return merged.result(stopped)


def _receive(receiver: Any) -> _Part:
    """A part; Ctrl-C reaches the workers too, who then send what they have."""
    while True:
        try:
            part: _Part = receiver.recv()
            return part
        except KeyboardInterrupt:
            continue


def _work(
    space: Space, pricer: Pricer, options: SearchOptions, share: tuple[int, int], limit: Any, sender: Any
) -> None:
    state = Search(space, pricer, options, share, limit)
    stopped = state.run()
    found = []
    for candidate in state.best.values():
        rule = candidate.formulation.problem.leading
        leading = rule.count if rule is not None else 0
        place = (candidate.pp, candidate.num_microbatches, candidate.family, leading)
        found.append((*place, candidate.assignment, candidate.objective_s))
    sender.send(_Part(found, state.bounds, state.solved, state.pruned, stopped))
    sender.close()
