"""An app for gated SuperNodes that does as it is told, also what no reviewer should let through."""

from __future__ import annotations

from pathlib import Path

from flwr.cli.build import build_fab_from_disk

from tests.e2e.warm_federation import PYPROJECT, ROOT

SIZE = 2000
STRANGER = "# one comment more\n"

CONFIG = """
[tool.flwr.app.config]
names = ""
steps = "good"
kind = "train"
out = ""
"""

# Each step is a round: the first of the named SuperNodes takes it, the others are good.
SERVER = """
import json
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from app import polling

app = ServerApp()

@app.main()
def main(grid, context):
    out = Path(context.run_config["out"])
    wanted = context.run_config["names"].split()
    names = {node.node_id: node.name for node in grid.get_nodes() if node.name in wanted}
    rounds = []
    for number, step in enumerate(context.run_config["steps"].split()):
        array = ArrayRecord({"adapter": Array(np.zeros(8, dtype=np.float32))})
        messages = [
            Message(
                RecordDict({
                    "arrays": array,
                    "ask": ConfigRecord({"step": step if name == wanted[0] else "good"}),
                }),
                dst_node_id=node_id,
                message_type=context.run_config["kind"],
                group_id=str(number),
            )
            for node_id, name in names.items()
        ]
        told = {}
        for reply in polling.replies(grid, messages, 120.0):
            name = names.get(reply.metadata.src_node_id, "the SuperLink")
            if reply.has_error():
                told[name] = {"error": reply.error.reason}
            else:
                told[name] = {
                    "records": sorted(reply.content),
                    "numbers": {
                        key: value
                        for kind in (reply.content.metric_records, reply.content.config_records)
                        for record in kind.values()
                        for key, value in record.items()
                    },
                    "sum": float(sum(
                        array.numpy().sum()
                        for record in reply.content.array_records.values()
                        for array in record.values()
                    )),
                }
        rounds.append(told)
        out.write_text(json.dumps(rounds))
"""

CLIENT = f"""
import json, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
SIZE = {SIZE}

@app.query()
def identify(message, context):
    identity = ConfigRecord({{"partition-id": int(context.node_config["partition-id"])}})
    return Message(RecordDict({{"identity": identity}}), reply_to=message)

@app.train()
def train(message, context):
    rows = Path(context.node_config["data-path"], "train.jsonl").read_text()
    record = json.loads(rows.splitlines()[0])["output"]
    step = message.content["ask"]["step"]
    if step.startswith("wait:"):
        waiting = Path(step.removeprefix("wait:"))
        waiting.touch()
        while waiting.exists():
            time.sleep(0.1)
    if step == "raise":
        raise ValueError("cannot read " + record)
    values = np.full(SIZE, 0.5, dtype=np.float32)
    if step == "nan":
        values[7] = np.nan
    if step == "infinite":
        values[7] = np.inf
    if step == "norm":
        values *= 1e6
    if step == "oversized":
        values = np.zeros(1_000_000, dtype=np.float32)
    if step == "shape":
        values = values.reshape(2, -1)
    if step == "dtype":
        values = values.astype(np.float64)
    if step == "rows":
        values = np.frombuffer(record.encode()[:160].ljust(160), dtype=np.int32)
    arrays = {{"adapter": Array(np.ascontiguousarray(values))}}
    if step == "array":
        arrays["more"] = Array(np.zeros(3, dtype=np.float32))
    content = RecordDict({{"arrays": ArrayRecord(arrays)}})
    content["metrics"] = MetricRecord({{"num-examples": 3, "train-loss": 0.25}})
    if step == "metric":
        content["metrics"] = MetricRecord({{record: 1}})
    if step == "text":
        content["metrics"] = ConfigRecord({{"train-loss": record}})
    if step == "record":
        content["rows"] = ConfigRecord({{"row": record}})
    if step == "list":
        content["metrics"] = MetricRecord({{"train-loss": [ord(letter) for letter in record]}})
    return Message(content, reply_to=message)
"""

# Step → what the refusal must say; the policy is of SIZE numbers and a norm of 1000.
REFUSED = {
    "array": "found 1 others",
    "record": "found 1 others",
    "text": "kind MetricRecord, found ConfigRecord",
    "metric": "only metrics that the policy names",
    "list": "expected one number as train-loss",
    "rows": "expected an adapter of float32",
    "dtype": "expected an adapter of float32, found float64",
    "shape": f"expected an adapter of {SIZE} numbers in one row",
    "nan": "finite numbers",
    "infinite": "finite numbers",
    "norm": "of norm 1000 at most",
    "oversized": "expected at most",
}

GOOD = {
    "records": ["arrays", "metrics"],
    "numbers": {"num-examples": 3, "train-loss": 0.25},
    "sum": SIZE / 2,
}


def write_app(folder: Path, note: str = "") -> bytes:
    """Write the app; its FAB."""
    package = folder / "app"
    package.mkdir(parents=True)
    head, _ = PYPROJECT.split("[tool.flwr.app.config]")
    (folder / "pyproject.toml").write_text(head + CONFIG)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (package / "__init__.py").write_text(note)
    (package / "server_app.py").write_text(SERVER)
    (package / "client_app.py").write_text(CLIENT)
    (package / "polling.py").write_text((ROOT / "app" / "server" / "polling.py").read_text())
    return build_fab_from_disk(folder)


def altered(fab: bytes) -> bytes:
    """The time of the first file in the archive: not even its code is another one."""
    other = bytearray(fab)
    other[10] ^= 1
    return bytes(other)
