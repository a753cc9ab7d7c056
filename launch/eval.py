"""Evaluate a run or model on held-out data: python launch/eval.py RUN_OR_MODEL --data FILE"""

import sys

from qwen3vl_train.train.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
