"""Synthetic problems for the benchmarks: chains no two layers of which are equal, and encoder-decoder chains.

Costs are drawn from what transformer layers cost (milliseconds, hundreds of megabytes), with strategies that trade
time for memory the way tensor parallelism, ZeRO and recomputation do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from uniap_tune.problem import EdgeTable, LayerTable, Problem
from uniap_tune.schedule import Schedule


def layer(rng: np.random.Generator, size: float, num_strategies: int, num_layouts: int) -> LayerTable:
    """A layer of relative ``size``: slower strategies are leaner, with noise, so that few are dominated."""
    lean = np.sort(rng.random(num_strategies))
    noise = 1 + 0.1 * rng.random(num_strategies)
    return LayerTable(
        layout=np.arange(num_strategies) % num_layouts,
        time_s=size * 10e-3 * (1 + 0.6 * lean) * noise,
        step_time_s=size * 5e-3 * rng.random(num_strategies),
        static_bytes=size * 1e9 * (1.2 - lean) * noise,
        microbatch_bytes=size * 3e8 * (1.2 - lean) * noise,
        transient_bytes=np.zeros(num_strategies),
        step_bytes=np.zeros(num_strategies),
    )


def borders(rng: np.random.Generator, num_layouts: int, size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Re-sharding (a metric) and sending, seconds."""
    points = rng.random((num_layouts, 2))
    reshard = size * 1e-3 * np.abs(points[:, None] - points[None, :]).sum(axis=2)
    return reshard, reshard + size * 5e-4


def chain(tables: list[LayerTable], stages: int, c: int, tightness: float, rng: np.random.Generator) -> Problem:
    """A chain with a memory limit between what the leanest (0) and the fastest (1) strategies of all layers need."""
    num_layouts = 1 + max(int(t.layout.max()) for t in tables)
    reshard, send = borders(rng, num_layouts)
    edges = tuple(EdgeTable(u, u + 1, reshard, send) for u in range(len(tables) - 1))
    flight = min(c, stages)
    lean = sum(float(t.bytes_in_flight(flight).min()) for t in tables) / stages
    fast = sum(float(t.bytes_in_flight(flight)[np.argmin(t.time_s)]) for t in tables) / stages
    limit = lean + tightness * (fast - lean)
    return Problem(stages, c, Schedule.ONE_F_ONE_B, limit, num_layouts, tuple(tables), edges)


def rescaled(problem: Problem, work: float, share: float) -> Problem:
    """The same layers with ``work`` times the micro-batch (seconds, activations) and ``share`` times the states."""
    tables = {
        id(t): LayerTable(
            t.layout,
            t.time_s * work,
            t.step_time_s * share,
            t.static_bytes * share,
            t.microbatch_bytes * work,
            t.transient_bytes,
            t.step_bytes,
        )
        for t in problem.layers
    }
    edge = problem.edges[0]
    moved = (edge.reshard_s * work, edge.send_s * work)
    edges = tuple(EdgeTable(e.source, e.target, *moved) for e in problem.edges)
    layers = tuple(tables[id(t)] for t in problem.layers)
    return replace(problem, layers=layers, edges=edges)


def outer(make: Callable[[int, int], Problem], devices: int, batch: int) -> list[Problem]:
    """One problem for each (stages, micro-batches) of a job: less work a micro-batch, more states a device, as the
    pipeline gets deeper; one memory limit for all."""
    limit = make(8, 32).memory_limit_bytes
    found = []
    for stages in (1, 2, 4, 8, 16, 32):
        for c in (d for d in range(1, batch + 1) if batch % d == 0):
            problem = rescaled(make(stages, c), (stages / 8) * (32 / c) * (32 / devices), stages / 8)
            found.append(replace(problem, memory_limit_bytes=limit))
    return found


def all_different(n: int, stages: int, num_strategies: int, *, c: int = 64, seed: int = 0) -> Problem:
    """No two layers equal."""
    rng = np.random.default_rng(seed)
    tables = [layer(rng, float(rng.uniform(0.7, 1.3)), num_strategies, 3) for _ in range(n)]
    return chain(tables, stages, c, 0.4, rng)


def equal_layers(n: int, stages: int, num_strategies: int, *, c: int = 64, seed: int = 0) -> Problem:
    """A transformer: a small first layer, n - 2 equal ones, a larger last one."""
    rng = np.random.default_rng(seed)
    block = layer(rng, 1.0, num_strategies, 3)
    ends = [layer(rng, size, num_strategies, 3) for size in (0.2, 1.5)]
    return chain([ends[0], *[block] * (n - 2), ends[1]], stages, c, 0.4, rng)


def swin_like(stages: int = 8, *, c: int = 32, seed: int = 0) -> Problem:
    """48 layers whose width grows and whose activations shrink along the chain, each a little different."""
    rng = np.random.default_rng(seed)
    tables = []
    for u in range(48):
        table = layer(rng, float(1 + 0.02 * u + 0.2 * rng.random()), 14, 3)
        shrink = 1 / (1 + u // 12)
        tables.append(
            LayerTable(
                table.layout,
                table.time_s,
                table.step_time_s,
                table.static_bytes / shrink / 4,
                table.microbatch_bytes * shrink,
                table.transient_bytes,
                table.step_bytes,
            )
        )
    return chain(tables, stages, c, 0.4, rng)


def t5_like(stages: int = 8, *, c: int = 32, seed: int = 0) -> Problem:
    """24 encoder and 24 decoder layers; the encoder's output travels with the activations to every decoder layer."""
    rng = np.random.default_rng(seed)
    encoder, decoder = layer(rng, 1.0, 14, 3), layer(rng, 1.5, 14, 3)
    ends = [layer(rng, size, 14, 3) for size in (0.2, 1.0)]
    problem = chain([ends[0], *[encoder] * 24, *[decoder] * 24, ends[1]], stages, c, 0.4, rng)
    doubled = (problem.edges[0].reshard_s * 2, problem.edges[0].send_s * 2)
    edges = tuple(EdgeTable(e.source, e.target, *doubled) if e.source >= 24 else e for e in problem.edges)
    return Problem(stages, c, problem.schedule, problem.memory_limit_bytes, 3, problem.layers, edges)
