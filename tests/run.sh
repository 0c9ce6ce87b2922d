#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs all the tests; arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${UNIAP_TEST_VENV:-.venv-test}"
[[ -x "$venv/bin/python" ]] || python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)

"${pip[@]}" --upgrade pip "setuptools>=77" wheel
# torch comes first: what is installed decides which build everything else gets.
"${pip[@]}" "torch==2.13.0"
"${pip[@]}" --editable ".[test,megatron]"
# DeepSpeed is a source distribution that imports torch while it builds.
"${pip[@]}" ninja py-cpuinfo
"${pip[@]}" --no-build-isolation "deepspeed==0.19.8"

exec "$venv/bin/python" -m pytest "$@"
