"""Keep ClientApps warm on this machine.

python -m supernode.warm serve  --socket PATH [--model local/NAME@4 ...]
python -m supernode.warm status --socket PATH [--json]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import sys
from pathlib import Path
from typing import IO

from common.errors import SuperNodeError, tell

from . import supervisor


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m supernode.warm", description="Keep ClientApps warm on this machine."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    texts = {
        "serve": "run the warm process, and run it again when it dies",
        "once": "run the warm process",
        "status": "say whether it answers; the exit status is 1 when it does not",
    }
    for verb, text in texts.items():
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument(
            "--socket",
            type=Path,
            default=os.environ.get("MEDFED_WARM_SOCKET"),
            help="its Unix socket (default: MEDFED_WARM_SOCKET)",
        )
        if verb == "status":
            command.add_argument("--json", action="store_true", help="as JSON")
            continue
        if verb == "once":
            command.add_argument(
                "--idle", type=float, help="end after so many seconds without a message"
            )
        command.add_argument(
            "--model",
            action="append",
            default=[model for model in _models_from_environment() if model],
            help="a base model to have ready, NAME or NAME@BITS; may be repeated "
            "(default: MEDFED_WARM_MODELS, separated by commas)",
        )
        command.add_argument(
            "--import",
            dest="imports",
            action="append",
            help="what to import instead of the default; may be repeated",
        )
    options = parser.parse_args(argv)
    if options.socket is None:
        parser.error("expected --socket or MEDFED_WARM_SOCKET")
    return options


def _models_from_environment() -> list[str]:
    return os.environ.get("MEDFED_WARM_MODELS", "").split(",")


def main(argv: list[str]) -> int:
    """Run one verb; the exit status."""
    options = parse(argv)
    path = Path(options.socket).absolute()
    _log_to_stderr()
    if options.verb == "status":
        ready = supervisor.is_ready(path)
        print(json.dumps({"ready": ready, "socket": str(path)}) if options.json else _say(ready))
        return 0 if ready else 1
    if options.verb == "serve":
        arguments = [part for model in options.model for part in ("--model", model)]
        arguments += [part for name in options.imports or () for part in ("--import", name)]
        supervisor.supervise(path, arguments)
        return 0
    return _once(path, options)


def _log_to_stderr() -> None:
    # Not the root logger: a forked ClientApp must not inherit a handler that a cold one lacks.
    log = logging.getLogger("supernode.warm")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s warm: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _say(ready: bool) -> str:
    return "ready" if ready else "nobody answers: messages start cold"


def _once(path: Path, options: argparse.Namespace) -> int:
    # Before anything heavy is imported: thread pools read these when their library is loaded.
    from .preload import ENVIRONMENT, IMPORTS, ModelSource

    os.environ.update(ENVIRONMENT)
    from . import server

    # One that a cold start left behind gives way to another; a supervised one is alone.
    lock = _lock(path) if options.idle is not None else None
    if options.idle is not None and lock is None:
        return 0
    try:
        models = [ModelSource.parse(text) for text in options.model]
        server.run(path, models, tuple(options.imports or IMPORTS), options.idle, lock)
    except SuperNodeError as error:
        return tell(error)
    return 0


def _lock(path: Path) -> IO[str] | None:
    """Hold the place at ``path``; None if another warm process warms up or serves there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
