"""The Python snippets of rendered plans build megatron-core's configuration objects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launches import megatron_launches

pytest.importorskip("megatron.core")

# Runs every snippet of a folder and shows, for each, what the three objects say of the plan.
CHECK = """
import pathlib, sys, warnings
warnings.simplefilter("ignore")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    names = {}
    try:
        exec(compile(path.read_text(), path, "exec"), names)
    except TypeError as error:  # a field of a later release
        print(path.stem, "skipped", error)
        continue
    config, ddp, optimizer = (names[n] for n in ("transformer_config", "ddp_config", "optimizer_config"))
    print(path.stem, config.num_layers, config.tensor_model_parallel_size, config.pipeline_model_parallel_size,
          ddp.use_distributed_optimizer, optimizer.optimizer)
"""


@pytest.mark.slow
def test_snippets_build_the_configuration_objects(tmp_path: Path) -> None:
    launches = megatron_launches()
    for number, launch in enumerate(launches):
        (tmp_path / f"{number:02}.py").write_text(launch.files()["mcore_config.py"], encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines() if line[:2].isdigit()]
    assert len(lines) == len(launches)
    built = [line for line in lines if line[1] != "skipped"]
    assert len(built) >= 20
    for number, layers, tp, pp, sharded, optimizer in built:
        launch = launches[int(number)]
        strategy = launch.plan.strategies[0]
        found = (int(layers), int(tp), int(pp), sharded == "True", optimizer)
        expected = (launch.model.num_layers, strategy.tp, launch.plan.pp, strategy.zero > 0, str(launch.job.optimizer))
        assert found == expected, launch.name


def test_the_yaml_says_the_same(tmp_path: Path) -> None:
    for launch in megatron_launches():
        document = yaml.safe_load(launch.files()["mcore.yaml"])
        kind, ddp, optimizer = document
        assert kind in ("TransformerConfig", "MLATransformerConfig")
        assert (ddp, optimizer) == ("DistributedDataParallelConfig", "OptimizerConfig")
        assert document[kind]["num_layers"] == launch.model.num_layers
