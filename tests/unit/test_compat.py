"""Hooks into Flower's inside: each is decided by the digests of its own functions."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

from compat import hooks
from compat.digests import SUPPORTED, differences, digest, original, replace

ROOT = Path(__file__).parents[2]
HOOKS = [hooks._load(name) for side in ("superlink", "supernode") for name in hooks._MODULES[side]]
ROOMS = ("app", "certs", "common", "superlink", "supernode", "embedded", "evaluation", "medfed",
         "benchmarks")  # fmt: skip
# What Flower documents, by ``__all__``.
PUBLIC = ("flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy",
          "flwr.simulation", "flwr.common")  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_the_installed_flower_is_one_that_the_hook_was_written_for(hook):
    """Fails when Flower changes what a hook stands on: read the diff, then add the digest."""
    assert hook.differences() == []


def test_every_hook_is_active_and_says_what_it_is_for():
    found = hooks.report()
    assert found.off == ()
    assert found.warnings() == []
    assert found.summary().endswith("9 of 9 hooks active")
    assert all(hook.gives and hook.without for hook in found.hooks)
    assert [hook.name for hook in found.hooks] == [hook.name for hook in HOOKS]


def test_a_hook_is_named_as_its_file_and_its_file_says_what_it_replaces():
    for side in hooks._MODULES.values():
        for name in side:
            module = import_module(f"compat.{name}")
            assert module.HOOK.name == name
            assert (module.__doc__ or "").startswith("Hook: ")


def test_every_pin_has_one_digest_or_one_for_each_supported_version():
    for hook in HOOKS:
        for names in hook.pins.values():
            for known in names.values():
                assert isinstance(known, str) or tuple(known) == SUPPORTED


def test_a_digest_stands_beside_the_version_that_it_was_read_in():
    installed = metadata.version("flwr")
    per_version = [
        (module, name, known)
        for hook in HOOKS
        for module, names in hook.pins.items()
        for name, known in names.items()
        if not isinstance(known, str)
    ]
    assert per_version
    for module, name, known in per_version:
        assert digest(original(module, name)) == known[installed]


@pytest.fixture
def changed(monkeypatch):
    """Change one function of Flower's."""

    def change(module, name):
        def other():
            """Another."""

        owner = import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, last, other)

    return change


@pytest.mark.parametrize(
    ("module", "name", "off"),
    [
        ("flwr.supercore.retry.http_retry", "make_simple_http_retry_invoker", ["retry"]),
        ("flwr.supercore.heartbeat", "HeartbeatSender", ["heartbeats"]),
        ("flwr.server.superlink.utils", "check_abort", ["serverapp_watchdog"]),
        ("flwr.superlink.servicer.runtime.runtime_handlers", "push_object", ["long_polling"]),
        ("flwr.supernode.start_client_internal", "_insert_message", ["clientapp_watchdog"]),
        ("flwr.cli.config_utils", "get_fab_metadata", ["site_gate"]),
        (
            "flwr.superlink.cli.flower_superlink",
            "_run_superlink_http_api",
            ["certificate_renewal"],
        ),
    ],
)
def test_a_changed_function_switches_off_the_hook_that_stands_on_it_and_no_other(
    changed, module, name, off
):
    changed(module, name)
    found = hooks.report()
    assert [hook.name for hook in found.off] == off
    (warning,) = found.warnings()
    assert f"expected {module}.{name} as in flwr 1.41.0 or 1.42.0, found it changed" in warning
    assert found.off[0].without in warning


def test_a_hook_is_off_with_the_one_that_it_requires(changed):
    changed("flwr.supernode.cli.flower_supernode", "flower_supernode")
    off = {hook.name: hook.reasons for hook in hooks.report().off}
    assert list(off) == ["supernode_polling", "heartbeats", "clientapp_watchdog"]
    assert off["heartbeats"] == ("it needs supernode_polling, which is off",)


def test_an_unknown_version_runs_with_the_hooks_whose_functions_are_unchanged(monkeypatch, changed):
    monkeypatch.setattr(hooks.metadata, "version", lambda _name: "1.99.0")
    assert hooks.report().summary() == "Flower 1.99.0: 9 of 9 hooks active"
    changed("flwr.supercore.heartbeat", "HeartbeatSender")
    assert hooks.report().summary() == "Flower 1.99.0: 8 of 9 hooks active"


@pytest.mark.parametrize(
    ("module", "name", "off"),
    [
        ("flwr.supercore.inflatable.inflatable_utils", "ObjectPushError", "retry"),
        ("flwr.proto.message_pb2", "PushObjectRequest", "long_polling"),
        ("flwr.superlink.routers.fleet.router", "router", "long_polling"),
        ("flwr.common.constant", "SYSTEM_TIME_TOLERANCE", "replay_guard"),
        ("flwr.cli.config_utils", "get_fab_metadata", "site_gate"),
        ("flwr.common.constant", "ErrorCode", "site_gate"),
    ],
)
def test_a_name_that_is_gone_switches_off_the_hook_whose_file_imports_it(module, name, off):
    # In a process of its own, for a file is imported once.
    code = f"""
import json
from importlib import import_module
import flwr.superlink.main, flwr.superlink.cli, flwr.supernode.cli
delattr(import_module({module!r}), {name!r})
import compat, compat.superlink, compat.supernode
print(json.dumps({{hook.name: [*hook.reasons, hook.gives, hook.without]
                  for hook in compat.report().off}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout)
    assert list(found) == [off]
    assert all(found[off])
    assert name in found[off][0]


def test_what_is_missing_and_not_flowers_is_no_reason_to_go_without_a_hook(monkeypatch):
    monkeypatch.delitem(sys.modules, "compat.retry", raising=False)
    monkeypatch.setitem(sys.modules, "common.retry", None)
    with pytest.raises(ImportError, match=r"common\.retry"):
        hooks.report("supernode")


def test_a_function_that_is_gone_is_said():
    module = "flwr.server.superlink.utils"
    pins = {module: {"gone": "0", "check_abort.gone": "0"}, "flwr.gone": {"f": "0"}}
    pins["builtins"] = {"len": "0"}
    assert differences(pins) == [
        f"expected {module}.gone, found none",
        f"expected {module}.check_abort.gone, found none",
        "expected flwr.gone.f, found none",
        "expected builtins.len as in flwr 1.41.0 or 1.42.0, found it changed",
    ]


def test_a_function_that_a_hook_has_replaced_is_compared_as_flower_has_it(monkeypatch):
    module, name = "flwr.server.superlink.utils", "check_abort"
    original = getattr(import_module(module), name)
    monkeypatch.setattr(import_module(module), name, original)
    pins = {module: {name: digest(original)}}
    assert replace(module, name, lambda: None) is original
    assert differences(pins) == []


def test_the_report_is_json_and_imports_no_torch():
    code = "import sys, compat.__main__, compat; compat.report(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    done = subprocess.run(
        [sys.executable, "-m", "compat"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    told = json.loads(done.stdout)
    assert told["flower"] in SUPPORTED
    assert {hook["active"] for hook in told["hooks"]} == {True}
    assert told["revisions"]


# --- Flower's inside is touched in one room ---


def private_names(source: str) -> list[str]:
    """What a file imports from Flower that Flower does not document.

    A module's name in a string counts too: ``import_module`` and its like take it.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if is_flower(name) and name not in PUBLIC]
        elif isinstance(node, ast.ImportFrom) and is_flower(node.module or ""):
            documented = import_module(str(node.module)).__all__ if node.module in PUBLIC else ()
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in documented
            ]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"flwr(\.\w+)+", str(node.value)):
            found += [node.value] if node.value not in PUBLIC else []
    return found


def is_flower(module: str) -> bool:
    return module == "flwr" or module.startswith("flwr.")


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_private_to_flower_is_imported_outside_compat(room):
    found = {
        str(file.relative_to(ROOT)): names
        for file in (ROOT / room).rglob("*.py")
        if (names := private_names(file.read_text()))
    }
    assert found == {}


def test_private_names_are_found_wherever_they_are_imported():
    source = """
import flwr.supercore.run
from flwr.app import Message, Metadata, Unknown
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr_datasets import FederatedDataset
def late():
    from flwr.supernode import cli
    import_module("flwr.supercore.fab")
    print("flwr.app", "of flwr.supercore")
"""
    assert private_names(source) == [
        "flwr.supercore.run",
        "flwr.app.Unknown",
        "flwr.common.constant.ErrorCode",
        "flwr.supernode.cli",
        "flwr.supercore.fab",
    ]
