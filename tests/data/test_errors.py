"""Faults keep what they know on their way through worker processes and into `rejected.jsonl`."""

import pickle

import pytest

from qwen3vl_train.data.errors import LAST_RESORT, MediaFault, Reject, RowFault


@pytest.mark.parametrize("fault_type", [RowFault, MediaFault])
def test_fault_keeps_kind_and_transient(fault_type):
    fault = pickle.loads(pickle.dumps(fault_type("no answer", kind="read_error", transient=True))).at("messages[0]")
    assert (type(fault), str(fault), fault.kind, fault.transient) == (
        fault_type, "messages[0]: no answer", "read_error", True,
    )  # fmt: skip
    assert Reject.from_fault("a.jsonl", 3, fault) == ("a.jsonl", 3, "messages[0]: no answer", "read_error")


def test_default_kinds():
    assert (RowFault("x").kind, MediaFault("x").kind) == ("invalid_value", "invalid_media")


@pytest.mark.parametrize("error", [OverflowError("large"), MemoryError(), RecursionError("deep"), KeyError("x")])
def test_any_exception_of_a_row_is_its_fault(error):
    with pytest.raises(RowFault) as caught, LAST_RESORT:
        raise error
    assert (caught.value.kind, caught.value.transient, caught.value.__cause__) == ("unexpected", True, error)
    assert str(caught.value).startswith(f"cannot be read, {type(error).__name__}: {error} (in test_errors.py:")


def test_faults_and_interrupts_pass_the_last_resort():
    for error in (RowFault("x", kind="too_long"), MediaFault("y"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, LAST_RESORT:
            raise error
        assert caught.value is error
