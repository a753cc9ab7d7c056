"""Look before training: python launch/inspect_data.py recipe.yaml [key=value ...] [--out page.html] [--json [file]]"""

import sys

from qwen3vl_train.inspect.cli import inspect_data

if __name__ == "__main__":
    sys.exit(inspect_data())
