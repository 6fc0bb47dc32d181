"""Run the gateway: check what can be checked, start nginx, and follow what changes on disk.

    python -m superlink.gateway --superlink superlink:8000 --fleet 0.0.0.0:8443 \\
        --certificate /certs/superlink.crt --key /certs/superlink.key --ca /certs/ca.crt \\
        --public-keys /public/supernodes --scratch /run/gateway

A renewed certificate, a CA bundle with a second CA, a key that came or went: nginx takes it up
without dropping a connection. What nginx would not take is said, and the old configuration stays.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from common.errors import SuperLinkError, tell

from .config import Settings, render

_LOOK_S = 1.0
_STOP_S = 5.0
ADDRESS = "HOST:PORT"
Stamp = tuple[tuple[str, int, int], ...]


def parse(argv: list[str]) -> Settings:
    """Read the command line.

    Raises:
        SuperLinkError: it asks for no listener, or for a fleet listener without keys.
    """
    parser = argparse.ArgumentParser(
        prog="python -m superlink.gateway", description="Run the gateway in front of a SuperLink."
    )
    parser.add_argument(
        "--superlink", required=True, help="the SuperLink's address", metavar=ADDRESS
    )
    parser.add_argument(
        "--superlink-name", help="the name in its certificate (default: the host of its address)"
    )
    parser.add_argument("--certificate", required=True, type=Path, help="the gateway's certificate")
    parser.add_argument("--key", required=True, type=Path, help="the certificate's private key")
    parser.add_argument("--ca", required=True, type=Path, help="the federation's CA certificate")
    parser.add_argument("--scratch", required=True, type=Path, help="a folder to write in")
    parser.add_argument("--fleet", help="where institutions are listened to", metavar=ADDRESS)
    parser.add_argument("--public-keys", type=Path, help="folder with each institution's NAME.pub")
    parser.add_argument(
        "--operator", help="where this machine's operator is listened to", metavar=ADDRESS
    )
    parser.add_argument(
        "--remote-operator",
        help="where operators with a client certificate are listened to",
        metavar=ADDRESS,
    )
    parser.add_argument("--health", help="where the health check asks", metavar=ADDRESS)
    options = parser.parse_args(argv)
    if not (options.fleet or options.operator or options.remote_operator):
        raise SuperLinkError(
            "expected something to listen on, found none",
            "--fleet, --operator or --remote-operator HOST:PORT",
        )
    if options.fleet and options.public_keys is None:
        raise SuperLinkError(
            "expected the institutions' public keys for the fleet listener, found none",
            "--public-keys FOLDER",
        )
    host = options.superlink.rpartition(":")[0]
    return Settings(**{**vars(options), "superlink_name": options.superlink_name or host})


class Gateway:
    """nginx under a configuration that follows its files.

    Args:
        settings: the gateway.

    Raises:
        SuperLinkError: a key or certificate cannot be used, or there is no nginx.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._config = settings.scratch / "nginx.conf"
        self._taken = self._stamp()
        self._write()
        self._nginx = subprocess.Popen(["nginx", "-p", settings.scratch, "-c", self._config])

    def wait(self, seconds: float) -> int | None:
        """nginx's exit status if it ends within ``seconds``; None: it runs."""
        try:
            return self._nginx.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def follow(self) -> None:
        """Take up what has changed on disk since the last look.

        Raises:
            SuperLinkError: what is wrong with it; the gateway goes on as it was.
        """
        stamp = self._stamp()
        if stamp == self._taken:
            return
        self._taken = stamp
        try:
            self._write()
        except SuperLinkError as error:
            raise SuperLinkError(
                f"not taken up, the gateway goes on as it was: {error}", error.hint
            ) from None
        self._nginx.send_signal(signal.SIGHUP)
        print("gateway: certificates or keys have changed, taken up", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End nginx: at once, for what it holds open may be held for minutes."""
        self._nginx.terminate()
        if self.wait(_STOP_S) is None:
            self._nginx.kill()

    def _stamp(self) -> Stamp:
        """What tells that a file was replaced or written to."""
        found = []
        for path in self._settings.files():
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((str(path), status.st_ino, status.st_mtime_ns))
        return tuple(found)

    def _write(self) -> None:
        """Write the configuration if nginx takes it; else leave what is there."""
        candidate = self._config.with_suffix(".candidate")
        candidate.write_text(render(self._settings), encoding="utf-8")
        try:
            done = subprocess.run(
                ["nginx", "-t", "-q", "-p", self._settings.scratch, "-c", candidate],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise SuperLinkError(
                "expected the command nginx, found none", "apt-get install nginx-light"
            ) from None
        complaints = [line for line in done.stderr.splitlines() if "[emerg]" in line]
        if done.returncode != 0:
            found = (complaints or done.stderr.splitlines() or ["no output"])[0]
            raise SuperLinkError(
                f"expected nginx to take certificate, key, CA and addresses, found: {found}",
                "`medfed certs check` says which file is not as it should be",
            )
        candidate.replace(self._config)


def main(argv: list[str]) -> int:
    """Run the gateway until it is stopped; the exit status."""
    try:
        settings = parse(argv)
        settings.scratch.mkdir(parents=True, exist_ok=True)
        gateway = Gateway(settings)
    except SuperLinkError as error:
        return tell(error)

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        while (status := gateway.wait(_LOOK_S)) is None:
            try:
                gateway.follow()
            except SuperLinkError as error:
                tell(error)
        return tell(SuperLinkError(f"expected nginx to run, found it ended with status {status}"))
    finally:
        gateway.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
