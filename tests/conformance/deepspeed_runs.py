"""Starting small DeepSpeed trainings on the CPU, for the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = Path(__file__).with_name("deepspeed_train.py")

# A GPT of the tests' script, as Hugging Face would describe it.
GPT = {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 1,
    "vocab_size": 64,
    "n_positions": 16,
    "n_inner": 128,
    "activation_function": "gelu",
    "tie_word_embeddings": False,
}
SECONDS = 300


def environment(**more: str) -> dict[str, str]:
    """Variables for DeepSpeed on a CPU with few cores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def free_port() -> str:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def deepspeed_script() -> Path:
    """The installed ``deepspeed`` command."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    assert found, "deepspeed is installed without its command"
    return Path(found)


def deepspeed(
    words: Sequence[str],
    folder: Path,
    *,
    python: str = sys.executable,
    command: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``deepspeed WORDS`` in a folder."""
    line = [python, *(command or [str(deepspeed_script())]), *words]
    return subprocess.run(
        line,
        cwd=folder,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def numbers(text: str, label: str) -> dict[str, list[float]]:
    """The lists that the script printed after this label, by configuration."""
    return {name: json.loads(values) for name, values in re.findall(rf"^{label} (\S+) (\[.*\])$", text, re.M)}
