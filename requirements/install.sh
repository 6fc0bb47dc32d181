#!/bin/sh
# requirements/install.sh PYTHON [pip options --] NAME...: install requirements/NAME.txt into
# PYTHON's environment, exactly what is listed and only files whose hashes are listed. torch's CUDA
# build, where pip finds that one, gets its libraries (cuda.txt); its CPU build needs none.
set -eu
python="$1"; shift
here="$(dirname "$0")"
options=""
case " $* " in
    *" -- "*)
        while [ "$1" != "--" ]; do options="$options $1"; shift; done
        shift ;;
esac
install() {
    # shellcheck disable=SC2086 # one word each
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        $options --requirement "$here/$1.txt"
}
for name in "$@"; do install "$name"; done
if "$python" -c 'from importlib.metadata import requires as r
import sys; sys.exit(not any(one.startswith(("nvidia", "cuda")) for one in r("torch") or ()))'; then
    install cuda
fi
"$python" -m pip check --quiet
