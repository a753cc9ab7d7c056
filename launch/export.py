"""Write what a run trained: python launch/export.py RUN [--merge] --out DIR"""

import sys

from qwen3vl_train.train.cli import export

if __name__ == "__main__":
    sys.exit(export())
