"""Faults keep what they know on their way through worker processes and into `rejected.jsonl`."""

import pickle

import pytest

from qwen3vl_train.data.errors import MediaFault, Reject, RowFault


@pytest.mark.parametrize("fault_type", [RowFault, MediaFault])
def test_fault_keeps_kind_and_transient(fault_type):
    fault = pickle.loads(pickle.dumps(fault_type("no answer", kind="read_error", transient=True))).at("messages[0]")
    assert (type(fault), str(fault), fault.kind, fault.transient) == (
        fault_type, "messages[0]: no answer", "read_error", True,
    )  # fmt: skip
    assert Reject.from_fault("a.jsonl", 3, fault) == ("a.jsonl", 3, "messages[0]: no answer", "read_error")


def test_default_kinds():
    assert (RowFault("x").kind, MediaFault("x").kind) == ("invalid_value", "invalid_media")
