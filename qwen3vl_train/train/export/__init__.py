"""Exports of a run: a PEFT adapter or a full checkpoint, checked by loading it into stock transformers."""

from qwen3vl_train.train.export.run import export_run as export_run
from qwen3vl_train.train.export.while_training import export_while_training as export_while_training
