"""Weights in Hugging Face form: read into our module tree, written so that transformers, peft and vLLM load them."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qwen3vl_train.arch import Qwen3VLArch, published_config, read_config
from qwen3vl_train.checkpoint.plain_weights import check_plain_weights
from qwen3vl_train.checkpoint.safetensors_writer import write_safetensors
from qwen3vl_train.dist.tensors import local_slice, to_local
from qwen3vl_train.model.hf_names import from_huggingface, to_huggingface
from qwen3vl_train.model.lora import base_name, is_adapter
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration

MAX_SHARD_BYTES = 5 * 10**9
_SAMPLED_BYTES = 1024


class WeightFiles:
    """The safetensors files of a checkpoint folder, by our names of the weights.

    Raises ValueError for a folder without weights, a file that is missing or truncated, weights of an unknown name, and
    weights that are not plain numbers (`check_plain_weights`).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files_of: dict[str, tuple[Path, str]] = {}
        unknown: list[str] = []
        dtypes: dict[str, str] = {}  # as stored
        for file in self._files():
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118  (not a dict)
                    dtypes[key] = handle.get_slice(key).get_dtype()
                    name = from_huggingface(key)
                    if name is None:
                        unknown.append(key)
                        continue
                    if name in self._files_of:
                        raise ValueError(f"{file}: {key} is stored twice, also as {self._files_of[name][1]}")
                    self._files_of[name] = (file, key)
                    self.shapes[name] = tuple(handle.get_slice(key).get_shape())
        check_plain_weights(self.folder, dtypes)
        if unknown:
            raise ValueError(f"{self.folder}: {_listed('unexpected weight', unknown)}; not a Qwen3-VL checkpoint?")

    def _files(self) -> list[Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            try:
                names = sorted(map(os.fspath, set(json.loads(index.read_text())["weight_map"].values())))
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index}: not a safetensors index ({error}); download the file again") from None
            if outside := [name for name in names if not _is_file_name(name)]:
                fault = f"weight_map names {outside[0][:100]!r}, which is not a file of this folder"
                raise ValueError(f"{index}: {fault}; put all files into one folder")
            files = [self.folder / name for name in names]
        else:
            files = [single]
        missing = [file.name for file in files if not file.is_file()]
        if missing and not (self.folder / "config.json").is_file():
            read_config(self.folder)  # which says what the path is instead
        if missing and (pickled := sorted(file.name for file in self.folder.glob("*.bin"))):
            raise ValueError(
                f"{self.folder}: weights are in {pickled[0]}, a pickle, which is not opened; convert them where you "
                "trust the file: AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(new_folder)"
            )
        if missing:
            raise ValueError(f"{self.folder}: missing {', '.join(missing)}; give a folder with all safetensors files")
        return files

    def read(self, slices: Mapping[str, tuple[slice, ...]]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) for each name and slice of its tensor, file by file.

        Only the slice is read. The values map the file: copy them.
        """
        by_file: dict[Path, list[str]] = {}
        for name in slices:
            by_file.setdefault(self._files_of[name][0], []).append(name)
        for file, members in by_file.items():
            with _open(file) as handle:
                for name in members:
                    yield name, handle.get_slice(self._files_of[name][1])[slices[name]]

    def read_one(self, name: str) -> Tensor:
        """Return all values of one tensor. They map the file as long as they are held, and nothing else of it."""
        ((_, values),) = self.read({name: tuple(map(slice, self.shapes[name]))})
        return values

    def fingerprint(self) -> int:
        """Return a checksum of names, sizes, headers, and a few bytes of every tensor, so that it costs little time.

        Another fine-tuning of the same model gives another checksum; a change of few elements may not.
        """
        checksum = 0
        for file in self._files():
            checksum = zlib.crc32(f"{file.name} {file.stat().st_size}".encode(), checksum)
            with file.open("rb") as content:
                length = content.read(8)
                header = content.read(int.from_bytes(length, "little"))
                checksum = zlib.crc32(header, checksum)
                for name, entry in json.loads(header).items():
                    if name != "__metadata__":
                        start, end = entry["data_offsets"]
                        position = max(start, (start + end - _SAMPLED_BYTES) // 2)
                        content.seek(8 + len(header) + position)
                        checksum = zlib.crc32(content.read(min(_SAMPLED_BYTES, end - position)), checksum)
        return checksum


def _is_file_name(name: str) -> bool:
    return Path(name).name == name not in ("", "..") and not {"\\", "\0"} & set(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        what = f"not a complete safetensors file ({file.stat().st_size} bytes; {error})"
        raise ValueError(f"{file}: {what}; download it again") from None


def _listed(noun: str, names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}: {', '.join(names[:limit])}{more}"


def check_weights(model: nn.Module, files: WeightFiles) -> None:
    """Compare names and shapes on disk with the model's, which may be on the meta device.

    Raises ValueError that names every kind of difference: missing, unexpected, wrong shape.
    """
    wanted = {
        base_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters() if not is_adapter(name)
    }
    tied = {base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)} - set(wanted)
    missing = [to_huggingface(name) for name in wanted if name not in files.shapes]
    if missing == ["lm_head.weight"]:
        raise ValueError(
            f"{files.folder}: no lm_head.weight, and config.json does not tie it to the embedding: a model for "
            "embeddings has no head to write text with; take an Instruct or Thinking checkpoint, or set "
            "tie_word_embeddings to true in config.json if they were tied"
        )
    extra = [to_huggingface(name) for name in files.shapes if name not in wanted and name not in tied]
    misshapen = [
        f"{to_huggingface(name)} is {files.shapes[name]}, config.json makes it {shape}"
        for name, shape in wanted.items()
        if files.shapes.get(name, shape) != shape
    ]
    faults = {"missing weight": missing, "unexpected weight": extra, "wrong shape": misshapen}
    lines = "".join(f"\n  - {_listed(noun, names)}" for noun, names in faults.items() if names)
    if lines:
        raise ValueError(f"{files.folder}: weights do not fit config.json{lines}")


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Allocate a model on the meta device in its dtypes, of a sharded one this rank's part. A tied head stays tied."""
    owners = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    model.to_empty(device=device)
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, meta in owners:
        first = allocated.setdefault(meta, getattr(module, name))
        if getattr(module, name) is not first:
            setattr(module, name, first)


def load_qwen3_vl_model(
    model_path: str | Path,
    config: dict[str, Any] | Qwen3VLArch | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Qwen3VLForConditionalGeneration:
    """Read a Hugging Face folder (one or many safetensors files) into our model; no second copy of it is ever held.

    config: use this instead of the folder's config.json.
    Raises ValueError that names missing, unexpected and wrongly shaped weights, truncated files, other architectures.
    """
    if not isinstance(config, Qwen3VLArch):
        config = Qwen3VLArch.from_pretrained(model_path) if config is None else Qwen3VLArch.from_dict(config)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    files = WeightFiles(model_path)
    check_weights(model, files)
    materialize(model.to(dtype), device)
    read_weights(model, files)
    return model


@torch.no_grad()
def read_weights(model: nn.Module, files: WeightFiles) -> None:
    """Read every stored weight into the model; of a sharded parameter this rank's part only. Adapters are skipped.

    Raises ValueError where a stored tied head differs from its embedding.
    """
    parameters = {
        base_name(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not is_adapter(name)
    }
    seen: set[nn.Parameter] = set()
    slices = {name: local_slice(parameter) for name, parameter in parameters.items() if name in files.shapes}
    for name, values in files.read(slices):
        parameter, target = parameters[name], to_local(parameters[name])
        if parameter in seen and not torch.equal(target, values.to(target)):
            raise _not_tied(files)
        seen.add(parameter)
        target.copy_(values)


def check_tied(model: nn.Module, files: WeightFiles) -> None:
    """Raise ValueError where a stored tied head differs from its embedding, as `read_weights` does, without memory."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(base_name(name))
    for tied in names.values():
        stored = [name for name in tied if name in files.shapes]
        if len(stored) > 1:
            first, *others = dict(files.read({name: tuple(map(slice, files.shapes[name])) for name in stored})).values()
            if not all(torch.equal(first, other) for other in others):
                raise _not_tied(files)


def _not_tied(files: WeightFiles) -> ValueError:
    return ValueError(
        f"{files.folder}: tie_word_embeddings is true, but lm_head.weight differs from embed_tokens.weight; "
        "set tie_word_embeddings to false in config.json if the head was trained apart"
    )


def write_huggingface(
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    source: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, dict[str, int]]:
    """Write the weights of a checkpoint that stock transformers loads: shards, index, published config.

    weights: by our names; a tied head once, as the embedding. An iterator works: one weight is held at a time.
    shapes: of all weights, in the same order.
    source: the folder whose config is written.

    Returns a checksum of every tensor by file and name, for `check_safetensors`.
    """
    checksums: dict[str, dict[str, int]] = {}
    remaining = iter(weights)
    shards = _shards({name: math.prod(shape) for name, shape in shapes.items()}, dtype, max_shard_bytes)
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {to_huggingface(name): tuple(shapes[name]) for name in names}
        checksums[file] = write_safetensors(folder / file, stored, _in_order(remaining, names), dtype)
    if len(shards) > 1:
        total = sum(map(math.prod, shapes.values())) * dtype.itemsize
        weight_map = {name: file for file, members in checksums.items() for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = published_config(read_config(source), dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return checksums


def _in_order(weights: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[Tensor]:
    for name in names:
        got, tensor = next(weights)
        assert name == got, f"got {got} where shapes say {name}"
        yield tensor


def _shards(sizes: Mapping[str, int], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, elements in sizes.items():
        filled += elements * dtype.itemsize
        if shards[-1] and filled > max_bytes:
            shards.append([])
            filled = elements * dtype.itemsize
        shards[-1].append(name)
    return shards
