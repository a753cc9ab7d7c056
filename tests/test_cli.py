import pytest

from qwen3vl_train.cli import run_or_explain


def test_the_notes_of_an_error_are_printed(capsys: pytest.CaptureFixture):
    def work() -> None:
        error = RuntimeError("step 5: rank 1 is late")
        error.add_note("step-00000004: could not be saved")
        raise error

    assert run_or_explain(work) == 1
    assert capsys.readouterr().err == (
        "error: step 5: rank 1 is late\nstep-00000004: could not be saved\n(QWEN3VL_TRACEBACK=1 shows where)\n"
    )
