"""Train: torchrun --nproc-per-node N launch/sft.py recipe.yaml [key=value ...]"""

import sys

from qwen3vl_train.train.cli import sft

if __name__ == "__main__":
    sys.exit(sft())
