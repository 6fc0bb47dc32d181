#!/bin/sh
# requirements/torch-build.sh PYTHON [pip options]: the option that makes pip take torch's CPU build,
# where pip finds that build. By itself pip would take PyPI's: it prefers files whose hash it knows
# before it has them, and a folder of wheels tells none.
set -eu
python="$1"; shift
cpu="$(dirname "$0")/torch-cpu.txt"
version="$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$cpu")"
if "$python" -m pip index versions "$@" torch 2>/dev/null | grep '^Available' | grep -qwF "$version"; then
    echo "--requirement $cpu"
fi
