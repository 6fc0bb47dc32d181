"""Records are read whole, or refused with the file that is wrong."""

from __future__ import annotations

import json
import os

import pytest

from medfed import records
from medfed.paths import Home
from medfed.records import RecordError
from tests.run_records import NAMES, write_record


def test_a_record_is_read_round_by_round(tmp_path):
    record = records.read(write_record(tmp_path / "7", engine="deployment"))
    assert (record.run_id, record.engine) == ("7", "deployment")
    assert [one.number for one in record.rounds] == [1, 2, 3]
    first = record.rounds[0]
    assert first.institutions == tuple(NAMES[1:3])
    assert [reply.institution for reply in first.replies] == NAMES[1:3]
    assert first.replies[0].metrics["train_seconds"] == 1.0
    assert (first.holdout_loss, record.rounds[-1].holdout_loss) == (None, 2.5)


def test_a_round_that_was_begun_anew_counts_once(tmp_path):
    folder = write_record(tmp_path / "7", rounds=1)
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    started = next(i for i, line in enumerate(lines) if "round-started" in line)
    lines[started:started] = lines[started : started + 2]  # it was asked, one replied, it died
    (folder / "events.jsonl").write_text("".join(lines))
    (only,) = records.read(folder).rounds
    assert [reply.institution for reply in only.replies] == NAMES[1:3]


def test_half_a_last_line_is_left_out(tmp_path):
    folder = write_record(tmp_path / "7", ended=False)
    with (folder / "events.jsonl").open("a") as log:
        log.write('{"event": "round-sta')
    record = records.read(folder)
    assert len(record.rounds) == 3
    assert record.summary is None


def test_last_is_the_newest_run(tmp_path):
    home = Home(tmp_path)
    for age, name in ((100, "1"), (0, "2"), (50, "3")):
        config = write_record(home.runs / name) / "config.json"
        os.utime(config, (10_000 - age, 10_000 - age))
    assert records.find(home, "last").run_id == "2"
    assert records.find(home, "3").run_id == "3"
    assert records.find(home, str(home.runs / "1")).run_id == "1"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "expected config.json"),
        (lambda f: (f / "provenance.json").write_text("{"), "expected JSON in .*provenance.json"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda f: (f / "events.jsonl").unlink(), "expected events.jsonl"),
        (lambda f: (f / "events.jsonl").write_text("nothing\n"), "expected JSON lines"),
        (
            lambda f: (f / "events.jsonl").write_text(
                json.dumps({"event": "round-finished", "round": 1}) + "\n"
            ),
            "without 1",
        ),
    ],
)
def test_a_damaged_record_says_which_file(tmp_path, spoil, said):
    folder = write_record(tmp_path / "7")
    spoil(folder)
    with pytest.raises(RecordError, match=said):
        records.read(folder)


@pytest.mark.parametrize("name", ["last", "123"])
def test_no_such_run_is_one_line(tmp_path, name):
    with pytest.raises(RecordError, match="found no"):
        records.find(Home(tmp_path), name)
