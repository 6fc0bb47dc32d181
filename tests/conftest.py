"""The container federation that the container tests share: built, provisioned and started once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from compat import digests
from tests.e2e.compose_project import (
    FEDERATION,
    NAMES,
    ONLINE_WITHIN_S,
    ROOT,
    ComposeProject,
    Federation,
    until,
)

SWITCH = "MEDFED_CONTAINER_TESTS"

# Runs in the provision container, which alone can write the volume of models.
TINY_MODEL = """
from pathlib import Path
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

models = Path("/medfed/models")
tokenizer = AutoTokenizer.from_pretrained(models / "SmolLM2-135M-Instruct-Q4_1")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
))
model.save_pretrained(models / "tiny")
tokenizer.save_pretrained(models / "tiny")
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the switch, container tests are skipped, and say how to run them."""
    if os.environ.get(SWITCH) == "1":
        return
    skip = pytest.mark.skip(reason=f"needs a Docker engine: {SWITCH}=1")
    for item in items:
        if item.get_closest_marker("containers"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_hook_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has replaced in Flower is not remembered in the next, which has it back."""
    monkeypatch.setattr(digests, "_originals", {})


@pytest.fixture(scope="session")
def project(request: pytest.FixtureRequest) -> Iterator[ComposeProject]:
    """An empty Compose project; logs stay under build/e2e/ when a test has failed."""
    failed_before = request.session.testsfailed
    project = ComposeProject()
    try:
        yield project
    finally:
        if request.session.testsfailed > failed_before:
            folder = ROOT / "build" / "e2e" / project.name
            project.keep_logs(folder)
            print(f"\ncontainer logs: {folder}")
        project.remove()


@pytest.fixture(scope="session")
def built(project: ComposeProject) -> ComposeProject:
    """The project with its images built."""
    project.compose("build", "provision", "gateway", NAMES[0], timeout=1800)
    return project


@pytest.fixture(scope="session")
def provisioned(built: ComposeProject) -> ComposeProject:
    """The project with certificates, keys, embedded model, partitions and a tiny model."""
    built.keep_runs_on_a_small_volume()
    built.compose("run", "--rm", "-T", "provision", timeout=900)
    built.compose(
        *("run", "--rm", "-T", "--entrypoint", "python", "provision", "-"),
        stdin=TINY_MODEL,
        timeout=300,
    )
    return built


@pytest.fixture(scope="session")
def federation(provisioned: ComposeProject) -> Federation:
    """The federation, up, every SuperNode healthy: connected by its own account."""
    begun = time.monotonic()
    provisioned.compose("up", "--detach", *FEDERATION, timeout=300)
    until(
        lambda: list(provisioned.health().values()) == ["healthy"] * len(FEDERATION),
        # More than is allowed: a test says whether it took too long, the others go on.
        3 * ONLINE_WITHIN_S,
        lambda: f"not healthy in time: {provisioned.health()}",
    )
    return Federation(provisioned, time.monotonic() - begun)
