#!/usr/bin/env bash
# Writes pythonVERSION.txt for each Python that the package supports, and
# cuda.txt: the newest releases that fit pyproject.toml, without addresses. Run
# it as `make constraints` after changing a dependency.
#
# usage: constraints/compile.sh BIN
#
# BIN is the folder of an environment with `python` and `uv`, which needs none of
# those Pythons to resolve for them.
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export LC_ALL=C
versions=(3.11 3.12 3.13)
# CUDA's extras have a file of their own; PyTorch has builds to choose from.
extras=$("$bin/python" -c "
import tomllib
with open('pyproject.toml', 'rb') as file:
  extras = tomllib.load(file)['project']['optional-dependencies']
print(*(f'--extra={e}' for e in extras if e not in {'cuda', 'cuda13', 'peer'}))
")
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT

# Prints the releases that a Python needs for some extras.
resolve() {
  local version=$1
  shift
  "$bin/uv" pip compile pyproject.toml --quiet --upgrade \
    --python-version "$version" --python-platform x86_64-manylinux_2_31 \
    --no-annotate --no-header --no-emit-index-url "$@"
}

for version in "${versions[@]}"; do
  file=$folder/python$version.txt
  # shellcheck disable=SC2086 # Several words.
  resolve "$version" $extras | sort >"$file"
  resolve "$version" --extra=cuda --extra=cuda13 -c "$file" | sort |
    comm -23 - "$file" | sed "s/$/ $version/" >>"$folder/cuda.all"
done
# A release that fits all of these Pythons needs no condition.
awk -v all="${#versions[@]}" '
  { count[$1]++; python[NR] = $2; release[NR] = $1 }
  END {
    for (i = 1; i <= NR; i++)
      if (count[release[i]] < all)
        print release[i] "; python_version == \"" python[i] "\""
      else if (!seen[release[i]]++)
        print release[i]
  }' "$folder/cuda.all" | sort >"$folder/cuda.txt"
# Only now, so that a failure leaves the old files as they were.
cp "$folder"/python*.txt "$folder/cuda.txt" constraints/
