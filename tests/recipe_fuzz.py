"""Damaged recipes: shared by the quick test of a few hundred and the long run of ten thousand."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.adapters.recipes import ReadOptions, read_recipe
from uniap_tune.errors import InputError
from uniap_tune.megatron.rules import violations
from uniap_tune.predict import predict
from uniap_tune.recipe import Changes, today_run, unsaid
from uniap_tune.spec import Cluster

RECIPES = Path(__file__).parent / "recipes"
VALUES = {"tensor-model-parallel-size": "4", "sequence-parallel": True}
REMOVED = frozenset({"recompute-granularity", "recompute-method", "num-virtual-stages-per-pipeline-rank"})

_PIECES = [
    b'"', b"'", b"`", b"$(", b"${", b"}", b")", b"(", b"$((", b"\\", b"\n", b"\t", b"#", b";", b"&&", b"|", b"<<EOF\n",
    b"if [ 1 -eq 1 ]; then\n", b"fi\n", b"done\n", b"case x in\n", b"esac\n", b"f() { f; }\nf\n", b"&a [*a, *a]", b"- ",
    b": ", b"{", b"[", b"]", b"!!python/object:os.system x", b"\x00", b"\xff\xfe", b"\xe2\x80\xae", b"--num-layers",
    b"--tensor-model-parallel-size 0", b"--pipeline-model-parallel-size -1", b"--seq-length 1e99",
    b"--num-layers 99999999999999999999", b"--pipeline-model-parallel-layout E(t*9999)*9999L", b"True", b"null", b"~",
    b"${A:-${A:-${A:-", b"${x[@]}", b"$@", b"$1", b"*", b"= lambda: 0\n", b"def f():\n    return f()\n",
]  # fmt: skip
_NUMBERS = [b"0", b"-1", b"3", b"1e9", b"7.5", b"1000000", b"99999999999999999999", b"nan", b"''", b"$N", b"true"]


def whole_files() -> list[tuple[str, bytes]]:
    """Recipes that are damaged as a whole, by suffix."""
    doubling = b"A=x\n" + b'A="$A$A"\n' * 64 + b"torchrun pretrain_gpt.py --num-layers $A\n"
    loops = b"for i in 1 2 3 4 5 6 7 8 9; do\n" * 12 + b"X=1\n" + b"done\n" * 12
    bomb = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [*%c, *%c, *%c]\n" % (98 + i, 98 + i, *[97 + i] * 3) for i in range(9)
    )
    return [
        (".sh", b"x" * 10_000_000),
        (".sh", b"torchrun pretrain_gpt.py --num-layers " + b"9" * 200_000),
        (".sh", doubling),
        (".sh", loops),
        (".sh", b"f() { f; f; }\nf\n"),
        (".sh", b"(" * 50_000),
        (".sh", b"$(" * 50_000),
        (".sh", b"${" * 50_000),
        (".sh", b'"$(' * 30_000),
        (".sh", b"if true; then " * 5_000),
        (".sh", b"{ " * 50_000),
        (".sh", b"f() " * 50_000),
        (".sh", b"! " * 50_000),
        (".sh", b"a=(" + b"x " * 100_000 + b")\ntorchrun t.py ${a[@]} --num-layers 2"),
        (".sh", b"\n" * 250_000),
        (".sh", b"a && " * 50_000),
        (".sh", b'A="' + b"--x 'y' " * 20_000 + b'"\neval "torchrun t.py $A --num-layers 1"\n'),
        (".sh", b"source ./damaged.sh\n"),
        (".yaml", b"MODEL_ARGS: " + b"[" * 30_000),
        *((".sh", b"for i in 1 " + char + b" 2; do\ndone\n") for char in (b"&", b"|", b"(", b")", b"&&")),
        (".yaml", b"MODEL_ARGS: " + b"{a: " * 10_000),
        (".yaml", bomb),
        (".yaml", b"x: 1\n" * 20_000),
        (".yaml", b"model:\n  hidden_size: " + b"${multiply:2, " * 2_000),
        (".yaml", b"model:\n  num_layers: ${.num_layers}\n"),
        (".yaml", b"- 1\n- 2\n"),
        (".yaml", b"MODEL_ARGS:\n  --num-layers: |\n" + b"    12\n" * 5_000),
        (".py", b"(" * 50_000),
        (".py", b"x = " + b"-" * 50_000 + b"1\n"),
        (".py", b"def f():\n    return " + b"1 + " * 20_000 + b"1\n"),
        (".py", b"def f():\n    return f()\n"),
        (".py", b"def f():\n    c = f" + b".a" * 20_000 + b"\n    return c\n"),
        (".py", b"\x00"),
        (".py", b"def f():\n    cfg.model = AutoBridge.from_hf_pretrained('" + b"m" * 400 + b"')\n    return cfg\n"),
        (".sh", b"source " + b"e" * 400 + b".sh\ntorchrun pretrain_gpt.py $ARGS\n"),
        (".txt", b"--num-layers " * 20_000),
        (".txt", b"'" + b"a" * 200_000),
        (".txt", b""),
    ]


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged recipe."""

    suffix: str
    content: bytes


def damaged(seed: int) -> Damage:
    """A shipped test recipe with one to three injuries."""
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in RECIPES.rglob("*") if p.is_file() and p.suffix != ".pyc"))
    content = path.read_bytes()
    for _ in range(rng.randint(1, 3)):
        content = _injure(rng, content)
    return Damage(path.suffix, content)


def _injure(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice([1, 5, 40, 400]))
    kind = rng.randrange(9)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    if kind == 2:
        return content[:end] + content[at:end] * rng.choice([1, 3, 50]) + content[end:]
    if kind == 3:
        return content[:at] + rng.randbytes(rng.choice([1, 8])) + content[at:]
    if kind == 4:
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 5:
        places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        if not places:
            return content
        place = rng.choice(places)
        return content[:place] + rng.choice(_NUMBERS) + content[place + 1 :]
    if kind == 6:
        return content[:at] + rng.choice(_PIECES) * rng.choice([2, 30, 2000]) + content[at:]
    return content[:at] + rng.choice(_PIECES) + content[at:]


def survive(damage: Damage, folder: Path, cluster: Cluster) -> tuple[str, float]:
    """Read, judge, price and rewrite a damaged recipe: the message of its error (empty: none), and the seconds it took.

    Anything but an :class:`InputError` that names the file is a failure.
    """
    path = folder / f"damaged{damage.suffix}"
    path.write_bytes(damage.content)
    started = time.process_time()
    message = ""
    try:
        recipe = read_recipe(str(path), ReadOptions())
        if not violations(recipe.facts(cluster)):
            assert predict(today_run(recipe, cluster)).step_time_s > 0
        changes = Changes(VALUES, REMOVED & recipe.arguments.keys())
        files = recipe.source.rewritten(changes, cluster, "h")
        unsaid(recipe, recipe.source.reread(files), changes)
    except InputError as error:
        message = str(error)
    seconds = time.process_time() - started
    if message:
        assert "damaged" in message or message.startswith("model "), message
        assert message.isprintable(), message
    return message, seconds


CLUSTER = "8x8:h100"
HANG_SECONDS = 20


def survive_all(seeds: range, folder: Path) -> float:
    """Survive the damages of these seeds; the longest time one took, in seconds of the processor."""
    cluster = read_cluster(CLUSTER)
    longest = 0.0
    with no_hang():
        for seed in seeds:
            signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
            longest = max(longest, survive(damaged(seed), folder, cluster)[1])
    return longest


@contextmanager
def no_hang() -> Iterator[None]:
    """Ends what goes on for ever, which may take all memory with it."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {HANG_SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
