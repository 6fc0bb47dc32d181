"""The run config: pyproject.toml is the reference entry, and a wrong value is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict, fuse_dicts
from packaging.version import Version

from app.config import RENAMED, RENAMED_UNTIL, RunConfig, current_names, keys
from app.errors import AppError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def defaults():
    return flatten_dict(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"])


def test_the_defaults_are_the_reference_entry(defaults):
    config = RunConfig.parse(defaults)
    assert config.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.model.quantization == 4
    assert (config.model.lora.r, config.model.lora.alpha) == (8, 16)
    assert config.model.lora.modules == ("q_proj", "v_proj")
    assert config.model.lora.dropout == 0.075
    assert (config.train.max_steps, config.train.batch_size, config.train.seq_length) == (
        10,
        16,
        512,
    )
    assert (config.train.learning_rate_max, config.train.learning_rate_min) == (2e-4, 6e-6)
    assert config.train.save_every_round == 5
    assert config.strategy.fraction_train == 0.1
    assert config.num_rounds == 200
    assert config.dataset_name == "medalpaca/medical_meadow_medical_flashcards"


def test_every_setting_stands_in_pyproject_and_the_other_way_round(defaults):
    assert sorted(defaults) == sorted([*keys(), *RENAMED])


def test_two_of_twenty_institutions_train_in_a_round(defaults):
    assert RunConfig.parse(defaults).strategy.sample_size(20) == 2


def test_the_learning_rate_falls_along_a_cosine(defaults):
    train = RunConfig.parse(defaults).train
    rates = [train.learning_rate(n, 200) for n in range(1, 201)]
    assert rates == sorted(rates, reverse=True)
    assert rates[99] == pytest.approx((2e-4 + 6e-6) / 2)
    assert rates[-1] == pytest.approx(6e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.quantization", 5),
        ("model.quantization", "4"),
        ("model.quantization", True),
        ("model.name", ""),
        ("model.lora.peft-lora-r", 0),
        ("model.lora.dropout", 1.0),
        ("train.seq-length", -1),
        ("train.dynamic-data-seed", 1),
        ("train.learning-rate-max", "fast"),
        ("strategy.fraction-train", 0.0),
        ("strategy.fraction-train", 1.5),
        ("num-server-rounds", 0),
        ("num-server-rounds", 2.5),
        ("static.dataset.name", " "),
    ],
)
def test_a_wrong_value_names_key_expectation_and_finding(defaults, key, value):
    with pytest.raises(AppError) as caught:
        RunConfig.parse({**defaults, key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}: expected ")
    assert f"found {value!r}" in message


def test_a_missing_key_is_named(defaults):
    del defaults["train.seed"]
    with pytest.raises(AppError, match=r"train\.seed: expected .* found nothing"):
        RunConfig.parse(defaults)


def test_an_unknown_key_comes_with_the_nearest_known_one(defaults):
    with pytest.raises(AppError, match=r"model\.quantisation.*did you mean model\.quantization"):
        RunConfig.parse({**defaults, "model.quantisation": 4})


def test_a_minimum_above_the_maximum_is_refused(defaults):
    with pytest.raises(AppError, match=r"train\.learning-rate-min: expected at most"):
        RunConfig.parse({**defaults, "train.learning-rate-min": 1.0})


def test_a_whole_number_does_for_a_number(defaults):
    assert RunConfig.parse({**defaults, "train.learning-rate-max": 1}).train.learning_rate_max == 1


# --- settings that have another name now ---


def test_a_superlink_takes_a_former_name_and_the_app_reads_it_as_the_current_one(defaults, caplog):
    config = RunConfig.parse(fuse_dicts(defaults, {"rounds.silence-s": 20}, check_keys=True))
    assert config.rounds.heartbeat_timeout_s == 20.0
    (line,) = caplog.messages
    assert "rounds.silence-s is now rounds.heartbeat-timeout-s" in line
    assert f"goes in version {RENAMED_UNTIL}" in line


@pytest.mark.parametrize(("old", "new"), list(RENAMED.items()))
def test_each_former_name_leads_to_a_setting_of_today(defaults, old, new):
    warnings = []
    assert current_names({**defaults, old: 77}, warnings.append)[new] == 77
    assert len(warnings) == 1
    assert new in keys()
    assert old not in keys()


def test_without_former_names_nothing_is_warned_of(defaults):
    warnings = []
    found = current_names(defaults, warnings.append)
    assert found == {key: value for key, value in defaults.items() if key not in RENAMED}
    assert warnings == []


def test_a_wrong_value_under_a_former_name_is_refused_under_the_current_one(defaults):
    with pytest.raises(AppError, match=r"rounds\.max-wait-s: expected .*, found -1"):
        RunConfig.parse({**defaults, "rounds.pause-s": -1})


def test_a_run_is_recorded_under_the_current_names(defaults):
    config = RunConfig.parse({**defaults, "replies.set-aside-after": 9})
    assert config.flat()["replies.quarantine-after"] == 9
    assert not set(config.flat()) & set(RENAMED)


def test_former_names_are_gone_in_the_version_that_their_warning_names():
    version = tomllib.loads(PYPROJECT.read_text())["project"]["version"]
    assert not RENAMED or Version(version) < Version(RENAMED_UNTIL)
