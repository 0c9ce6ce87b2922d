"""What a launch script would start: followed without running it, or captured when asked for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_tune import CLUSTER, FILES, RECIPES, plans_for, read
from uniap_tune.adapters.arguments import occurrences
from uniap_tune.adapters.bash_run import run_script
from uniap_tune.adapters.capture import capture
from uniap_tune.adapters.megatron_shell import read_shell
from uniap_tune.adapters.recipes import ReadOptions, read_recipe
from uniap_tune.errors import InputError
from uniap_tune.tuning import changes_for

MODEL = "--num-layers 16 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128"
BATCH = "--micro-batch-size 1 --global-batch-size 64"


def words(text: str, tmp_path: Path, given: dict[str, str] | None = None) -> list[str]:
    """The words of the last launch of a script; unknown ones are ``?``."""
    path = tmp_path / "script.sh"
    path.write_text(text)
    launch = run_script(path, given).launches[-1]
    return [word.text or ("?" if word.unknown else "") for word in launch.words]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1\npython t.py $A", "python t.py 1"),
        ("python t.py ${A:-2} ${B-3} ${C:+4} x", "python t.py 2 3 x"),
        ("A=5\npython t.py ${A:+yes} ${A:-no}", "python t.py yes 5"),
        ("A=(a 'b c' \"d\")\npython t.py \"${A[@]}\"", "python t.py a|b c|d"),
        ("A=(a 'b c')\npython t.py ${A[@]}", "python t.py a b c"),
        ("A=(a)\nA+=(b)\nA+=(c)\npython t.py ${A[*]}", "python t.py a b c"),
        ("A=x\nA+=y\npython t.py $A", "python t.py xy"),
        ("python t.py a \\\n  b\\\nc", "python t.py a bc"),
        ("A=3; B=$((A*4+$A%2))\npython t.py $B", "python t.py 13"),
        ("A=8; (( A > 4 )) && python t.py big || python t.py small", "python t.py big"),
        ("f() { python t.py $1 \"$@\"; }\nf a b", "python t.py a a b"),
        ("f() { local A=$1; shift; B=$1; shift; python t.py $A $B $#; }\nf a b c", "python t.py a b 1"),
        ('f() { shift 2; python t.py "$@"; }\nf a b c', "python t.py c"),
        ('f() { shift 3; python t.py "$@"; }\nf a b', "python t.py a b"),
        ('f() { shift; g "$@"; python t.py $1; }\ng() { shift; }\nf a b c', "python t.py b"),
        ('set -eu -- a b\nshift\npython t.py "$@"', "python t.py b"),
        ("for i in 1 2; do A+=\" $i\"; done\npython t.py $A", "python t.py 1 2"),
        ("A=b\ncase $A in\n a) X=1;;\n b|c) X=2;;\nesac\npython t.py $X", "python t.py 2"),
        ("if [ -z \"$U\" ]; then X=1; else X=2; fi\npython t.py $X", "python t.py 1"),
        ("A=x\nif [[ $A == x && -n $A ]]; then X=1; fi\npython t.py $X", "python t.py 1"),
        ("if [ $# -lt 2 ]; then echo usage; fi\npython t.py a", "python t.py a"),
        ("while [ $# -gt 0 ]; do X=$1; shift; done\nX=${X:-d}\npython t.py $X", "python t.py d"),
        ("cat <<EOF\n' \" $(\nEOF\npython t.py a", "python t.py a"),
        ("A='--x 1'\neval \"python t.py $A --y '2 3'\"", "python t.py --x 1 --y|2 3"),
        ("A=\"cd /x; python t.py --x\"\nsrun sh -c \"$A 1\"", "python t.py --x 1"),
        ("A=$(hostname)\npython t.py $A", "python t.py ?"),
        ("python t.py \"$@\" $NOPE", "python t.py ?"),
        ("A=ABC\npython t.py ${A,,} ${#A}", "python t.py abc 3"),
        ("A=(1 2 3)\npython t.py ${#A[@]} ${A[1]}", "python t.py 3 2"),
        ("export A=1 B=\"2 3\"\npython t.py $B # no\n# python t.py z", "python t.py 2 3"),
        ("X=1 torchrun t.py a > log 2>&1", "torchrun t.py a"),
        ("A=(a b)\npython t.py \"${A[*]@Q}\"", "python t.py 'a' 'b'"),
    ],
)  # fmt: skip
def test_what_is_started(text: str, expected: str, tmp_path: Path) -> None:
    """``|`` in the expectation separates words that hold blanks."""
    found = words(text, tmp_path)
    assert " ".join(found) == expected.replace("|", " ")
    if "|" in expected:
        assert expected.split("|")[1] in " ".join(found)


def test_the_reading_agrees_with_bash(tmp_path: Path) -> None:
    """Every shell recipe of the tests, as bash itself expands it."""
    for name in FILES:
        if not name.startswith("shell/"):
            continue
        path = RECIPES / name
        given = {"NODE_RANK": "0"}
        static = run_script(path, given).launches[-1].arguments
        real = capture(path, given)
        found = [word.text for word in static if not word.unknown]
        assert [word for word in real if word in found] == found, name


def test_unknown_words_behind_a_value_are_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text("[[ -d /x ]] && E='--load /x'\npython t.py --num-layers 4 $E --save a $E\n", encoding="utf-8")
    found = {item.name: item for item in occurrences(run_script(path).launches[-1].arguments)}
    assert [value.text for value in found["num-layers"].values] == ["4"]
    assert not found["num-layers"].unknown
    assert found["save"].unknown  # it may take several


def test_given_variables(tmp_path: Path) -> None:
    assert words("python t.py $NNODES ${A:-1}", tmp_path, {"NNODES": "4", "A": "2"})[2:] == ["4", "2"]


def test_what_is_not_known_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text(f"TP=$(detect)\ntorchrun pretrain_gpt.py {MODEL} {BATCH} \\\n  --tensor-model-parallel-size $TP\n")
    with pytest.raises(InputError) as caught:
        read_shell(path)
    assert caught.value.what == f"{path}:3: the value of --tensor-model-parallel-size is not known"
    assert f"$(detect) at {path}:1" in caught.value.why


def test_arguments_under_a_condition_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text(
        f"A=()\nif nvidia-smi; then\n  A+=(--swiglu)\nfi\ntorchrun pretrain_gpt.py {MODEL} {BATCH} ${{A[@]}}\n"
    )
    with pytest.raises(InputError, match=r"r\.sh:3: whether --swiglu is given is not known"):
        read_shell(path)


def test_a_launch_under_a_condition_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text(f"if [[ $BATCH -eq 0 ]]; then\n  torchrun train.py {MODEL} {BATCH}\nfi\n")
    with pytest.raises(InputError, match=r"starts no python training script") as caught:
        read_shell(path)
    assert caught.value.why == f"the condition at {path}:1 is not known"
    assert read_shell(path, {"BATCH": "0"}).job.global_batch == 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tensor-model-parallel-size two", "must be a whole number of at least 1, not 'two'"),
        ("--tensor-model-parallel-size", "has no value"),
        ("--normalization Batch", "must be one of LayerNorm, RMSNorm"),
        ("--rotary-base x", "must be a number"),
        ("--moe-layer-freq [0]*3+[1]*14 --num-experts 4", "cannot be planned"),
    ],
)
def test_wrong_values_are_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text(f"torchrun pretrain_gpt.py {MODEL} {BATCH} \\\n  {line}\n")
    with pytest.raises(InputError, match=r"r\.sh") as caught:
        read_shell(path)
    assert words in str(caught.value)


def test_nothing_is_executed_while_reading(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "r.sh"
    path.write_text(f"touch {witness}\nX=$(touch {witness})\nsource ./none.sh\ntorchrun t.py {MODEL} {BATCH}\n")
    read_recipe(str(path))
    assert not witness.exists()


def test_execute_captures_what_only_running_can_tell(tmp_path: Path) -> None:
    path = tmp_path / "r.sh"
    path.write_text(
        "#!/bin/bash\nTP=$(echo 2)\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n"
        f"torchrun --nproc-per-node 8 pretrain_gpt.py {MODEL} {BATCH} --tensor-model-parallel-size $TP \\\n"
        '  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "$@"\n'
    )
    recipe = read_recipe(str(path), ReadOptions(execute=True))
    assert recipe.arguments["tensor-model-parallel-size"].value == "2"
    for plan in plans_for(recipe):
        changes = changes_for(recipe, plan, CLUSTER)
        files = recipe.source.rewritten(changes, CLUSTER, "h")
        assert changes_for(recipe.source.reread(files), plan, CLUSTER).is_empty


def test_a_captured_script_is_stopped_in_time_and_sees_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    path = tmp_path / "r.sh"
    path.write_text(f"sleep 30\ntorchrun t.py {MODEL}\n")
    with pytest.raises(InputError, match="did not end within 1 s"):
        capture(path, {}, time_limit_s=1)
    path.write_text(f"torchrun t.py {MODEL} --save ${{SECRET:-nothing}}\n")
    assert capture(path, {})[-1] == "nothing"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("shell/")])
def test_bash_gives_the_tuned_arguments_the_last_word(name: str, tmp_path: Path) -> None:
    """The written scripts, run by bash with stand-ins: the plan's layout arrives in one piece."""
    recipe = read(name)
    plan = next(plan for plan in plans_for(recipe) if plan.pp == 4)
    files = recipe.source.rewritten(changes_for(recipe, plan, CLUSTER), CLUSTER, "h")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
        assert subprocess.run([shutil.which("bash") or "bash", "-n", str(tmp_path / file)], check=False).returncode == 0
    argv = capture(tmp_path / Path(name).name, {})
    flag = "--pipeline-model-parallel-layout"
    changed = changes_for(recipe, plan, CLUSTER).values
    assert flag[2:] in changed
    assert argv[len(argv) - 1 - argv[::-1].index(flag) + 1] == changed[flag[2:]]
