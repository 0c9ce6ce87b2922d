"""``deepspeed --autotune uniap`` as a user types it, in an environment of its own with the hook enabled in it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest

from tests.conformance.deepspeed_runs import GPT, SCRIPT, deepspeed, deepspeed_script, environment, free_port, numbers
from uniap_tune.adapters.deepspeed import read_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ROOT = Path(__file__).parents[2]
PTH = "uniap_tune_deepspeed.pth"

# The script can build a pipeline or not, so its text alone does not say.
UNIAP = {"model": "config.json", "cluster": "1x2:a100-80gb", "seq_length": 16, "pipeline": False}
USER_JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 1000,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 100000000},
    "autotuning": {"uniap": UNIAP},
}


class Environment:
    """A virtual environment with this package as a wheel; what else it needs comes from the one of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, symlinks=True)
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", paths))
        self.bin = Path(sysconfig.get_path("scripts", "venv", paths))
        self.python = str(self.bin / Path(sys.executable).name)
        (self.site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        text = deepspeed_script().read_text(encoding="utf-8").partition("\n")[2]
        (self.bin / "deepspeed").write_text(f"#!{self.python}\n{text}", encoding="utf-8")
        (self.bin / "deepspeed").chmod(0o755)
        self.run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Its Python with these arguments, which must succeed."""
        done = subprocess.run(
            [self.python, *words], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def deepspeed(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """Its ``deepspeed`` command."""
        return deepspeed(words, folder, python=self.python, command=[str(self.bin / "deepspeed")])

    def tune(self, word: str) -> str:
        """``uniap-tune deepspeed WORD``."""
        return self.run("-m", "uniap_tune", "deepspeed", word).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project") / "uniap-tune"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("uniap_tune", "adapters", "templates"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=project, check=True, capture_output=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def enabled(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment"), wheel)
    made.tune("enable")
    return made


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a script, its JSON and the model's configuration."""
    shutil.copy(SCRIPT, tmp_path / "train.py")
    (tmp_path / "config.json").write_text(json.dumps(GPT), encoding="utf-8")
    (tmp_path / "ds.json").write_text(json.dumps(USER_JSON, indent=2), encoding="utf-8")
    return tmp_path


def test_the_literal_command_plans(enabled: Environment, job: Path) -> None:
    words = shlex.split("--autotune uniap --num_gpus 2 train.py --deepspeed --deepspeed_config ds.json")
    run = enabled.deepspeed(job, *words)
    assert run.returncode == 0, run.stdout + run.stderr
    results = job / "autotuning_results"
    names = {"plan.json", "ds_config_optimal.json", "cmd_optimal.txt", "summary.txt"}
    assert {path.name for path in results.iterdir()} == names
    summary = (results / "summary.txt").read_text(encoding="utf-8")
    assert summary in run.stdout
    assert "DeepSpeed 0.19.8 accepts it" in summary
    assert "~ zero_optimization.stage: 3 -> " in summary
    config = read_config(results / "ds_config_optimal.json")
    assert config["optimizer"] == USER_JSON["optimizer"]
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 100000000
    assert "autotuning" not in config
    plan = json.loads((results / "plan.json").read_text(encoding="utf-8"))
    assert plan["status"] == "optimal"
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert batch * plan["stages"][0]["strategies"][0]["dp"] == config["train_batch_size"] == 8
    command = (results / "cmd_optimal.txt").read_text(encoding="utf-8").split()
    expected = ["deepspeed", "--num_gpus", "2", "train.py", "--deepspeed", "--deepspeed_config"]
    assert command == [*expected, str(results / "ds_config_optimal.json")]


def test_run_trains_after_planning(enabled: Environment, job: Path) -> None:
    """With ``tuner_type`` in the JSON in place of ``--autotune``."""
    tuned = USER_JSON | {"autotuning": {"uniap": UNIAP, "tuner_type": "uniap"}}
    (job / "ds.json").write_text(json.dumps(tuned), encoding="utf-8")
    port = ["--master_port", free_port()]
    words = ["--num_gpus", "2", *port, "train.py", "--steps", "3", "--deepspeed", "--deepspeed_config", "ds.json"]
    run = enabled.deepspeed(job, "--autotuning", "run", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    losses = numbers(run.stdout, "LOSSES")["ds_config_optimal.json"]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses == pytest.approx(numbers(run.stdout, "REFERENCE")["ds_config_optimal.json"], rel=1e-4)


def test_a_failing_script_shows_its_own_error_and_code(enabled: Environment, job: Path) -> None:
    words = shlex.split("--autotune uniap --autotuning run --uniap_check false --num_gpus 2")
    script = shlex.split("train.py --fail 7 --deepspeed --deepspeed_config ds.json")
    run = enabled.deepspeed(job, *words, "--master_port", free_port(), *script)
    assert run.returncode == 7
    assert "this script fails on purpose" in run.stderr
    assert "no optimal configuration" not in (run.stdout + run.stderr).lower()


def test_an_interruption_ends_what_was_started_and_nothing_else(enabled: Environment, job: Path) -> None:
    (job / "train.py").write_text("import time\nprint('READY', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    words = shlex.split("--autotune uniap --autotuning run --uniap_check false --num_gpus 2")
    script = shlex.split("train.py --deepspeed --deepspeed_config ds.json")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "train.py"])
    command = [enabled.python, str(enabled.bin / "deepspeed"), *words, "--master_port", free_port(), *script]
    run = subprocess.Popen(command, cwd=job, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        for line in run.stdout:
            if "READY" in line:
                break
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 3  # the launcher, its launch.py, two ranks
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=100) == 128 + signal.SIGINT
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        run.kill()
        run.wait()
        if run.stdout:
            run.stdout.close()


def test_an_unmodified_pipeline_script_is_cut_as_planned(enabled: Environment, job: Path) -> None:
    """The script asks for a uniform split; the plan says otherwise, through an environment variable."""
    text = (job / "train.py").read_text(encoding="utf-8").replace("uniap_tune.deepspeed", "elsewhere")
    (job / "train.py").write_text(text.replace("pipeline_module", "not_used"), encoding="utf-8")
    (job / "config.json").write_text(json.dumps(GPT | {"n_layer": 5}), encoding="utf-8")
    words = shlex.split("--autotune uniap --autotuning run --uniap_fix pp=2,microbatches=4 --num_gpus 2")
    words += ["--uniap_pipeline", "true"]
    script = shlex.split("train.py --model pipeline --blocks 5 --deepspeed --deepspeed_config ds.json")
    run = enabled.deepspeed(job, *words, "--master_port", free_port(), *script)
    assert run.returncode == 0, run.stdout + run.stderr
    split = json.loads((job / "autotuning_results" / "pipeline_split.json").read_text(encoding="utf-8"))
    assert f"of {split['parts']}" in run.stdout
    name = "ds_config_optimal.json"
    assert numbers(run.stdout, "LOSSES")[name] == pytest.approx(numbers(run.stdout, "REFERENCE")[name], rel=1e-4)
    assert "PYTHON_UNIAP_TUNE_PLAN=" in (job / "autotuning_results" / "cmd_optimal.txt").read_text(encoding="utf-8")


def test_a_hostfile_is_planned_for_without_reaching_its_hosts(enabled: Environment, job: Path) -> None:
    (job / "hosts").write_text("".join(f"node-{i} slots=8\n" for i in range(4)), encoding="utf-8")
    words = shlex.split("--autotune uniap --hostfile hosts --exclude node-3 --uniap_cluster 8x8:h100")
    more = shlex.split("--uniap_model llama-2-7b --uniap_seq_length 4096 --uniap_global_batch 96 --uniap_check false")
    run = enabled.deepspeed(job, *words, *more, "train.py", "--deepspeed_config", "ds.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 x 8 h100" in run.stdout
    plan = json.loads((job / "autotuning_results" / "plan.json").read_text(encoding="utf-8"))
    assert plan["inputs"]["cluster"]["num_nodes"] == 3


def test_disabled_again_deepspeed_is_as_it_was(wheel: Path, tmp_path: Path, job: Path) -> None:
    """Enabled, disabled, enabled and uninstalled: nothing is left, and DeepSpeed and Python work."""
    made = Environment(tmp_path / "environment", wheel)
    assert "not enabled" in made.tune("status")
    made.tune("enable")
    assert (made.site / PTH).exists()
    assert str(made.site) in made.tune("status")
    made.tune("disable")
    assert not (made.site / PTH).exists()
    run = made.deepspeed(job, "--autotune", "uniap", "train.py", "--deepspeed_config", "ds.json")
    assert run.returncode == 2
    assert "unrecognized arguments: --autotune" in run.stderr
    made.tune("enable")
    left = (made.site / PTH).read_text(encoding="utf-8")
    made.run("-m", "pip", "uninstall", "--quiet", "--yes", "uniap-tune")
    assert not list(made.site.glob("*uniap*"))
    (made.site / PTH).write_text(left, encoding="utf-8")  # as if something had kept pip from removing it
    assert made.run("-c", "print('works')").stderr == ""
    run = made.deepspeed(job, "--autotune", "uniap", "train.py", "--deepspeed_config", "ds.json")
    assert (run.returncode, "uniap_tune" in run.stderr) == (2, False)


def test_a_plain_python_does_not_notice_the_hook(enabled: Environment, tmp_path: Path) -> None:
    """Nothing of it is imported but for DeepSpeed's command with a tuning option; the benchmark measures its time."""
    look = "import sys; print([name for name in sys.modules if name.startswith(('uniap', 'deepspeed'))])"
    script = tmp_path / "deepspeed"
    script.write_text(look, encoding="utf-8")
    for words in (["-c", look], ["-c", look, "--autotune", "uniap"], [str(script), "train.py"]):
        assert enabled.run(*words).stdout == "[]\n"
    assert "uniap_tune.deepspeed.hook" in enabled.run(str(script), "--autotune", "uniap", "train.py").stdout
