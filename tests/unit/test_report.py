"""One page about a run: whole in itself, and true to the record."""

from __future__ import annotations

import json
import re

import pytest

from medfed import records
from medfed.paths import Home
from medfed.report import PLOTS, ReportError, facts, participation, write
from tests.run_records import NAMES, write_record

PNG = b"\x89PNG\r\n"


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    home = Home(tmp_path)
    record = records.read(write_record(home.runs / "7"))
    page = write(home, record).read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/png;base64,") == len(PLOTS)
    for one in record.rounds:
        assert one.adapter_sha256[:16] in page
    for key in record.config:
        assert key in page
    assert {path.stem for path in (record.folder / "plots").glob("*.png")} == set(PLOTS)
    assert all(path.read_bytes().startswith(PNG) for path in record.folder.glob("plots/*.png"))


def test_the_same_run_gives_the_same_page(tmp_path):
    home = Home(tmp_path)
    record = records.read(write_record(home.runs / "7"))
    assert write(home, record).read_bytes() == write(home, record).read_bytes()


def test_what_a_run_names_cannot_break_the_page(tmp_path):
    config = {"model.name": "<script>alert(1)</script>"}
    home = Home(tmp_path)
    page = write(home, records.read(write_record(home.runs / "7", config=config))).read_text()
    assert "<script>" not in page


def test_an_institution_that_never_took_part_is_shown_as_such(tmp_path):
    counts = participation(records.read(write_record(tmp_path / "7")))
    assert list(counts) == NAMES
    assert (counts[NAMES[0]], counts[NAMES[1]], counts[NAMES[2]]) == (0, 1, 2)


def test_the_facts_name_engine_losses_and_bytes_on_the_wire(tmp_path):
    home = Home(tmp_path)
    record = records.read(write_record(home.runs / "7", engine="deployment"))
    assert "on the wire" not in facts(home, record)
    log = home.supernodes / NAMES[1] / "flwr" / "wire.jsonl"
    log.parent.mkdir(parents=True)
    lines = [
        {"run_id": "7", "sent": 2**20, "received": 2**20},
        {"run_id": "8", "sent": 1, "received": 1},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = facts(home, record)
    assert found["engine"] == "deployment"
    assert found["held-out loss"] == "3.0000 → 2.5000"
    assert found["on the wire"] == "2.00 MB with TLS and HTTP"


def test_a_run_without_a_round_has_nothing_to_report(tmp_path):
    folder = write_record(tmp_path / "7", rounds=1)
    first = (folder / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "events.jsonl").write_text(first)
    with pytest.raises(ReportError, match="expected a finished round"):
        write(Home(tmp_path), records.read(folder))
