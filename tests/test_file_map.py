"""docs/architecture.md names every module, and no document names a file that does not exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen3vl_train"
DOCUMENTS = sorted(file for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for file in ROOT.glob(pattern))


def test_file_map_names_every_module_once():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\S+\.py)` \| \S", text.partition("\n## File map\n")[2], re.MULTILINE)
    modules = [file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_documents_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.py|\w+/\w+/)`|(tests/[\w/]+\.py)", text)
    paths = [path for pair in named for path in pair if path]
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, PACKAGE))]
    missing += [link for link in links if not (document.parent / link).exists()]
    assert missing == []
