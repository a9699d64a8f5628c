#!/usr/bin/env bash
# Collect the wheels that gpu.sh needs, on a machine with a network: the versions of infra/constraints.txt.
#
#   bash infra/benchmarks/wheels.sh FOLDER                # with the CUDA build of torch from PyPI, several GB
#   bash infra/benchmarks/wheels.sh FOLDER --no-torch     # 60 MB, for a machine that has a torch >= 2.9
#
# PYTHON           the interpreter that runs pip; by default python3
# TARGET_PYTHON    version of the GPU machine's Python, e.g. 3.12; by default that of PYTHON

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { echo "wheels.sh: name a folder (see the file)" >&2; exit 2; }
folder="$1"
TARGET_PYTHON="${TARGET_PYTHON:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"

# What fm_core imports for training and sampling, with its dependencies, besides torch.
PACKAGES=(
    annotated-types einops fsspec hjson isal msgpack ninja numpy packaging pillow psutil py-cpuinfo pydantic
    pydantic_core PyYAML safetensors scipy setuptools torchdiffeq tqdm typing-inspection typing_extensions
)
SOURCES=(deepspeed) # published as sources
PEERS=(torchcfm==1.0.7 flow-matching==1.0.10 pot==0.9.7.post1 torchdyn==1.0.6 diffusers==0.42.1)

platforms=()
for name in manylinux_2_{28,27,26,24,17,12,5} manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
target=(--only-binary=:all: --implementation cp --python-version "$TARGET_PYTHON" "${platforms[@]}")
pip=("$PYTHON" -m pip --disable-pip-version-check)
common=(--constraint "$ROOT/infra/constraints.txt")

mkdir -p "$folder"
"${pip[@]}" download "${common[@]}" "${target[@]}" --no-deps --dest "$folder" "${PACKAGES[@]}" "${PEERS[@]}"
"${pip[@]}" wheel "${common[@]}" --no-deps --wheel-dir "$folder" "${SOURCES[@]}"
if [ "${2-}" != --no-torch ]; then
    "${pip[@]}" download "${common[@]}" "${target[@]}" --dest "$folder" torch
fi
ls "$folder"
