"""supernode/roster.py: the twenty of the repository, and every rule a roster can break."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SuperNodeError
from supernode import roster
from supernode.roster import GpuSlice


def entries(count: int, **common: object) -> list[dict[str, object]]:
    return [
        {"name": f"supernode-{i:02d}", "partition": i, "cpus": 1, **common} for i in range(count)
    ]


def test_the_repositorys_roster_has_twenty_supernodes():
    found = roster.load()
    assert found.names == tuple(f"supernode-{i:02d}" for i in range(20))
    assert [entry.partition for entry in found.supernodes] == list(range(20))
    assert found.num_partitions == 20


def test_all_twenty_share_one_gpu():
    slices = [entry.gpu for entry in roster.load().supernodes]
    assert slices == [GpuSlice(device="0", memory=0.05)] * 20


def test_a_supernode_may_differ_from_the_defaults():
    found = roster.parse(
        {
            "defaults": {"cpus": 1.0, "gpu": {"device": "0", "memory": 0.5}},
            "supernode": [
                {"name": "a", "partition": 0, "gpu": {"device": "MIG-1c2d/3/0", "memory": 1}},
                {"name": "b", "partition": 1, "gpu": False, "cpus": 2.5},
                {"name": "c", "partition": 2},
            ],
        }
    )
    assert [entry.gpu for entry in found.supernodes] == [
        GpuSlice("MIG-1c2d/3/0", 1.0),
        None,
        GpuSlice("0", 0.5),
    ]
    assert [entry.threads for entry in found.supernodes] == [1, 2, 1]


@pytest.mark.parametrize(
    ("supernodes", "message"),
    [
        ([], "at least one"),
        ([{"partition": 0, "cpus": 1}], "to have a name"),
        ([{"name": "Upper", "partition": 0, "cpus": 1}], "to have a name"),
        ([{"name": "a", "partition": "0", "cpus": 1}], "partition to be a whole number"),
        ([{"name": "a", "partition": True, "cpus": 1}], "partition to be a whole number"),
        ([{"name": "a", "partition": 1, "cpus": 1}], "the partitions 0 to 0"),
        ([{"name": "a", "partition": 0}], "cpus to be above 0"),
        ([{"name": "a", "partition": 0, "cpus": 0}], "cpus to be above 0"),
        ([{"name": "a", "partition": 0, "cpus": 1, "cpu": 1}], "found cpu"),
        (entries(2) + entries(1), "supernode-00 more than once"),
        ([*entries(2), {"name": "c", "partition": 1, "cpus": 1}], "found 0, 1, 1"),
        (entries(1, gpu=True), "a table or false"),
        (entries(1, gpu={"device": 0, "memory": 0.5}), "index or a GPU or MIG UUID"),
        (entries(1, gpu={"device": "0", "memory": 0}), "above 0 and up to 1"),
        (entries(1, gpu={"device": "0", "memory": 1.1}), "above 0 and up to 1"),
        (entries(1, gpu={"device": "0", "memory": 0.1, "mps": 0}), "from 1 to 100"),
        (entries(1, gpu={"device": "0", "memory": 0.1, "mps": 2.5}), "from 1 to 100"),
        (entries(21, gpu={"device": "0", "memory": 0.05}), "found 1.05"),
    ],
)
def test_a_broken_rule_is_named(supernodes, message):
    with pytest.raises(SuperNodeError, match=message) as caught:
        roster.parse({"supernode": supernodes})
    assert "\n" not in str(caught.value)


def test_slices_of_different_gpus_do_not_add_up():
    tables = entries(2)
    for i, table in enumerate(tables):
        table["gpu"] = {"device": str(i), "memory": 1.0}
    assert len(roster.parse({"supernode": tables}).supernodes) == 2


@given(st.integers(min_value=1, max_value=50))
def test_equal_decimal_shares_of_one_gpu_always_fit(count):
    share = int(1000 / count) / 1000
    found = roster.parse({"supernode": entries(count, gpu={"device": "0", "memory": share})})
    assert found.num_partitions == count


def test_a_missing_or_malformed_file_is_refused(tmp_path):
    with pytest.raises(SuperNodeError, match="no such file"):
        roster.load(tmp_path / "roster.toml")
    (tmp_path / "roster.toml").write_text("[[supernode]\n")
    with pytest.raises(SuperNodeError, match="expected a TOML roster"):
        roster.load(tmp_path / "roster.toml")


def test_an_unknown_name_is_refused():
    with pytest.raises(SuperNodeError, match="20 in all"):
        roster.load().entry("supernode-20")


@pytest.mark.parametrize("partition", [-1, 20])
def test_a_partition_outside_the_roster_is_refused(partition):
    with pytest.raises(SuperNodeError, match="from 0 to 19"):
        roster.load().check_partition(partition)
