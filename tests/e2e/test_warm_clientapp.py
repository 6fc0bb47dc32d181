"""ClientApps forked from a warm process, in a real federation: TLS, node keys, SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.warm_federation import ROOT, Federation, warm_process, write_app

pytestmark = pytest.mark.processes


def replies(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [reply for one in rounds for reply in one["replies"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def federation(home: Path) -> Iterator[Federation]:
    """Two SuperNodes. Another ``app`` is on the machine, and a third is imported already."""
    other = home / "machine"
    write_app(other, marker="from the machine")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{other}{os.pathsep}{before}"
    try:
        libraries = ("--import", "flwr.supernode.cli", "--import", "app.errors")
        with (
            warm_process(home, *libraries) as socket,
            Federation(
                home, 2, warm=socket, environment={"PYTHONPATH": f"{other}{os.pathsep}{ROOT}"}
            ) as started,
        ):
            assert "imported app.errors" in (home / "warm.log").read_text()
            yield started
    finally:
        os.environ["PYTHONPATH"] = before


def test_the_fabs_code_runs_from_the_fab(federation, home):
    told = replies(federation.run(write_app(home / "one", marker="from the FAB"), rounds=2))
    assert len(told) == 4
    assert {reply["marker"] for reply in told} == {"from the FAB"}
    for reply in told:
        assert reply["file"].startswith(str(home / "flwr" / reply["name"] / "apps"))
    assert "cold start" not in federation.log("supernode-00") + federation.log("supernode-01")


def test_the_next_run_gets_its_own_code(federation, home):
    first = replies(federation.run(write_app(home / "first", marker="first"), rounds=1))
    second = replies(federation.run(write_app(home / "second", marker="second"), rounds=1))
    assert {reply["marker"] for reply in first} == {"first"}
    assert {reply["marker"] for reply in second} == {"second"}


def test_nothing_is_carried_over_from_one_message_to_the_next(federation, home):
    told = replies(federation.run(write_app(home / "one"), rounds=4))
    assert [reply["seen"] for reply in told] == [1] * 8
    assert len({reply["pid"] for reply in told}) == 8
    assert len({reply["random"] for reply in told}) == 8


@pytest.mark.parametrize("what", ["exit", "kill", "segfault"])
def test_a_message_that_dies_takes_no_other_along(federation, home, what):
    app = write_app(home / "one")
    told = replies(federation.run(app, rounds=1, what=what, target="supernode-00", timeout=180.0))
    by_name = {reply.get("name", "supernode-00"): reply for reply in told}
    assert by_name["supernode-01"]["error"] == ""
    assert by_name["supernode-00"]["error"]
    after = replies(federation.run(app, rounds=1))
    assert sorted(reply["name"] for reply in after) == ["supernode-00", "supernode-01"]


def test_without_a_warm_process_messages_start_cold_and_the_log_says_so(tmp_path):
    with Federation(tmp_path, 2, warm=tmp_path / "nobody") as federation:
        told = replies(federation.run(write_app(tmp_path / "small"), rounds=1))
        assert sorted(reply["error"] for reply in told) == ["", ""]
        assert "flwr-clientapp: cold start" in federation.log("supernode-00")


MODELS = """
import os, sys, tempfile
from supernode.warm import preload
os.environ.update(preload.ENVIRONMENT)
from supernode.warm import child
folder = sys.argv[1]
registry = preload.preload(("torch", "transformers"), [preload.ModelSource(folder, 0)])
import torch
expected = torch.load(f"{folder}/expected.pt")

def in_child():
    child._threads({"OMP_NUM_THREADS": "2"})
    assert torch.get_num_threads() == 2
    big = torch.rand(1500, 1500)
    assert torch.allclose(big @ big, (big.double() @ big.double()).float(), rtol=1e-3)
    tasks = len(os.listdir("/proc/self/task"))
    assert tasks > 1, tasks
    model = sys.modules["medfed_warm"].take(folder, 0)
    assert model is not None and not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == torch.float32
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert sys.modules["medfed_warm"].take(folder, 0) is None

for _ in range(2):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            in_child()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
print("two children")
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with what it answers to one prompt."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.tensor([[1, 2, 3]])).logits, folder / "expected.pt")
    return folder


def test_each_child_gets_the_base_model_and_as_many_threads_as_it_may_use(tiny_model):
    """OpenMP in a child works because the warm process never had a pool; weights are its own."""
    done = subprocess.run(
        [sys.executable, "-c", MODELS, str(tiny_model)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout == "two children\n", done.stderr
