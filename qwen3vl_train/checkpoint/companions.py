"""The files beside the weights of an export: tokenizer, chat template, processors, in a form that every server opens.

transformers 4.57 and 5 write different files, and 5 reads both. An export has the form of 4.57, which the released
checkpoints have, with what transformers 5 saved beside it where the base has that.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_train.arch import without_code

# What serving needs beside the weights; copied where present.
COMPANION_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip
_PROCESSORS = {"preprocessor_config.json": "image_processor", "video_preprocessor_config.json": "video_processor"}
"""The file of a processor in 4.57, and its section of transformers 5's processor_config.json."""


def copy_companions(
    source: str | Path,
    folder: Path,
    *,
    template: str | None = None,
    pixel_limits: tuple[int, int] | None = None,
    clip_settings: Mapping[str, Any] | None = None,
) -> None:
    """Copy tokenizer, template, processor and generation files; write into them what was used in training.

    template: the text of the chat template, written wherever a version looks for it.
    pixel_limits: least and most pixels of an image.
    clip_settings: keys of the video processor, `size` among them.
    """
    for name in COMPANION_FILES:
        if (file := Path(source) / name).is_file():
            shutil.copyfile(file, folder / name)
    for file in folder.glob("*.json"):
        _drop_code(file)
    _split_processor_config(folder)
    _write_tokenizer_config(folder, template)
    if template is not None:
        _write_template(folder, template)
    if pixel_limits is not None:
        least, most = pixel_limits
        size = {"shortest_edge": least, "longest_edge": most}
        # Both spellings: the slow image processor of 4.57 reads the second alone.
        settings = {"size": size, "min_pixels": least, "max_pixels": most}
        _write_settings(folder, "preprocessor_config.json", settings)
    if clip_settings is not None:
        _write_settings(folder, "video_preprocessor_config.json", clip_settings)


def write_card(folder: Path, *, name: str, base: str, hub_id: str | None, is_adapter: bool) -> None:
    """Write README.md, the model card that the Hugging Face Hub shows.

    name: of the run. base: path or name of its base. hub_id: of the base, which the hub links to; None: no link.
    """
    library, what = ("peft", "LoRA adapter of") if is_adapter else ("transformers", "fine-tuned from")
    facts = [f"base_model: {hub_id}"] if hub_id else []
    facts += [f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    head = "\n".join(["---", *facts, "---"])
    text = f"{head}\n\n# {name}\n\nQwen3-VL, {what} `{base}` with qwen3vl_train.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _split_processor_config(folder: Path) -> None:
    """Write the files of the processors that 4.57 reads, where transformers 5 saved sections of one file."""
    sections = _read(folder / "processor_config.json")
    for name, section in _PROCESSORS.items():
        settings = sections.get(section)
        if isinstance(settings, dict) and not (folder / name).is_file():
            settings = {key: value for key, value in settings.items() if value is not None}
            settings.setdefault("processor_class", sections.get("processor_class", "Qwen3VLProcessor"))
            if section == "image_processor":  # 5 has names for its own classes; 4.57 derives both of its from this one
                settings["image_processor_type"] = "Qwen2VLImageProcessorFast"
            _write(folder / name, settings)


def _write_tokenizer_config(folder: Path, template: str | None) -> None:
    """Write the keys of 4.57 where transformers 5 saved its own; put the template in, where it is not there already."""
    config = _read(folder / "tokenizer_config.json")
    if not config:
        return
    before = dict(config)
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57 wants an object of names there
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "Qwen2Tokenizer"
    for key in ("backend", "is_local", "local_files_only"):  # of the machine that saved it
        config.pop(key, None)
    if template is not None and not isinstance(config.get("chat_template"), list):  # a list has templates by name
        config["chat_template"] = template
    if config != before:
        _write(folder / "tokenizer_config.json", config)


def _write_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if _read(folder / "chat_template.json").get("chat_template") != template:
        _write(folder / "chat_template.json", {"chat_template": template})


def _write_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write settings of a processor into its own file, and into its section of processor_config.json."""
    old_names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    for file, section in ((folder / name, None), (folder / "processor_config.json", _PROCESSORS[name])):
        content = _read(file)
        part = content if section is None else content.get(section)
        if not isinstance(part, dict) or not part:
            continue
        part.update(settings)
        for old, new in old_names.items():
            if part.get(old) is not None:
                part[old] = settings["size"][new]
        _write(file, content)


def _drop_code(file: Path) -> None:
    """Remove `auto_map` from a file of settings: it names Python code, which an export does not hold."""
    content = _read(file) if file.name in COMPANION_FILES and file.name.endswith("config.json") else {}
    kept = without_code(content)
    if kept != content:
        _write(file, kept)


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
