"""Bytes: as the leaderboard counts them, before a run and during one."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from app.server.communication import BUDGET_MB, MB, Communication, array_bytes
from medfed.cli import app as cli
from medfed.communication import NUMPY_HEADER, CommunicationError, architecture, predict
from medfed.paths import Home


@pytest.mark.parametrize(
    ("model", "tensors", "published"),
    [
        ("SmolLM2-135M", 120, 1417.97),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 120, 1417.97),
        ("SmolLM2-360M", 128, 2512.50),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 128, 2512.50),
    ],
)
def test_the_published_totals_of_the_reference_come_out(tmp_path, model, tensors, published):
    found = predict(Home(tmp_path), model, 200, clients=2).as_dict()
    assert found["tensors"] == tensors
    assert found["reference_mb"] == published
    assert found["flat_mb"] < published


def test_what_is_foretold_for_the_flat_layout_is_what_flower_sends(tmp_path):
    found = predict(Home(tmp_path), "SmolLM2-135M", 1, clients=1)
    assert found.flat_bytes == 2 * len(Array(np.zeros(found.parameters, np.float32)).data)


@pytest.mark.parametrize("shape", [(8, 576), (576, 8), (192, 8)])
def test_an_array_of_the_reference_layout_has_a_header_of_128_bytes(shape):
    values = np.zeros(shape, np.float32)
    assert len(Array(values).data) == values.nbytes + NUMPY_HEADER


def test_a_model_in_a_folder_is_read_from_its_config(tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({**sizes, "num_key_value_heads": 2}))
    assert predict(Home(tmp_path), "local/tiny", 1, clients=1).parameters == 2 * 8 * (64 + 48)


@pytest.mark.parametrize("name", ["GPT-9", "local/none"])
def test_a_model_that_nobody_knows_is_refused(tmp_path, name):
    with pytest.raises(CommunicationError, match=f"found '{name}'"):
        architecture(Home(tmp_path), name)


def test_the_log_has_the_reference_s_two_lines_a_round(tmp_path):
    communication = Communication(tmp_path / "comm_cost.txt")
    for _ in range(400):
        communication.add(2 * 1_858_560)
    lines = (tmp_path / "comm_cost.txt").read_text().splitlines()
    assert lines[0] == "Communication budget: used 3.54 MB (+3.54 MB this round) / 200,000 MB"
    assert lines[1] == "Communication budget: used 7.09 MB (+3.54 MB this round) / 200,000 MB"
    assert lines[-1] == "Communication budget: used 1417.97 MB (+3.54 MB this round) / 200,000 MB"
    assert communication.total == 1_486_848_000


def test_going_over_the_budget_is_said_once(tmp_path, caplog):
    communication = Communication(tmp_path / "comm_cost.txt", total=BUDGET_MB * MB - 1)
    for _ in range(3):
        communication.add(1)
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "expected at most 200,000 MB, found 200000.00" in warning.getMessage()


def test_a_message_without_content_costs_nothing(monkeypatch):
    for attribute in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, attribute, 1)
    arrays = ArrayRecord({"adapter": Array(np.zeros(3, np.float32))})
    message = Message(RecordDict({"arrays": arrays}), dst_node_id=1, message_type="train")
    assert array_bytes([message]) == 12 + NUMPY_HEADER
    assert array_bytes([]) == 0


def test_the_command_prints_both_layouts(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    done = CliRunner().invoke(cli, ["comm", "--model", "SmolLM2-360M", "--rounds", "200", "--json"])
    found = json.loads(done.stdout)
    assert (found["reference_mb"], found["flat_mb"]) == (2512.50, 2500.10)


@pytest.mark.parametrize("arguments", [[], ["last", "--model", "SmolLM2-135M"]])
def test_the_command_wants_a_run_or_a_model_and_not_both(monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    done = CliRunner().invoke(cli, ["comm", *arguments])
    assert isinstance(done.exception, CommunicationError)
