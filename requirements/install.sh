#!/bin/sh
# requirements/install.sh PYTHON [pip options --] NAME...: install requirements/NAME.txt into
# PYTHON's environment, exactly what is listed and only files whose hashes are listed. torch is its
# CPU build where pip finds that one (torch-cpu.txt), else PyPI's with its CUDA libraries (cuda.txt).
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
        $options "$@"
}
for name in "$@"; do
    if [ "$name" = runtime ]; then
        # shellcheck disable=SC2046,SC2086 # one word each
        install --requirement "$here/runtime.txt" $("$here/torch-build.sh" "$python" $options)
    else
        install --requirement "$here/$name.txt"
    fi
done
if "$python" -c 'from importlib.metadata import requires as r
import sys; sys.exit(not any(one.startswith(("nvidia", "cuda")) for one in r("torch") or ()))'; then
    install --requirement "$here/cuda.txt"
fi
"$python" -m pip check --quiet
