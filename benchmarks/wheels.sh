#!/usr/bin/env bash
# Downloads what benchmarks/wheels.txt lists, for a machine without network: benchmarks/wheels.sh
# [FOLDER [PYTHON_VERSION]], by default wheels/ for Python 3.12 on Linux, x86-64.
set -euo pipefail
folder=${1:-wheels} version=${2:-3.12}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
  --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --dest "$folder" --requirement benchmarks/wheels.txt
du -sh "$folder"
