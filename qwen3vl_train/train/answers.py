"""Evaluation of a run or model on a file: its loss, and generated answers compared with the expected ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen3vl_train.arch import read_config
from qwen3vl_train.checkpoint.hf import load_qwen3_vl_model
from qwen3vl_train.config import EvalSource
from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.errors import LAST_RESORT, RowFault
from qwen3vl_train.data.open import open_collator
from qwen3vl_train.data.rows.sample import Sample
from qwen3vl_train.data.sources import FileSource, open_sources
from qwen3vl_train.model.generate import generate_greedy
from qwen3vl_train.model.qwen3vl import DTYPES, Qwen3VLForConditionalGeneration
from qwen3vl_train.public_names import public_name
from qwen3vl_train.train.load_run import FoundCheckpoint, find_checkpoint, is_run_folder, restore_run

# Prompts are continued together up to this many tokens; the cache of the largest model then stays near 4 GiB.
MAX_PROMPT_TOKENS = 8192


def open_model(
    path: Path, dtype: str | None, *, step: int | None = None, best: str | None = None
) -> tuple[Qwen3VLForConditionalGeneration, MultimodalCollator, FoundCheckpoint | None]:
    """Open a run folder (a checkpoint, its pixel budgets) or a Hugging Face folder, on the GPU if there is one.

    dtype: of the arithmetic; None for that of the run or the checkpoint.
    step, best: which checkpoint of a run, see `find_checkpoint`; by default the newest.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_run_folder(path):
        found = find_checkpoint(path, step=step, best=best)
        run = restore_run(found, dtype=DTYPES[dtype] if dtype else None, device=device)
        return run.model, open_collator(run.recipe), found
    if step is not None or best is not None:
        raise ValueError(f"{path}: not a run folder, so it has no step to choose; take --step or --best away")
    config = read_config(path)
    stored = str(config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype"))
    dtype = dtype or ("float32" if stored == "float32" else "bfloat16")
    model = load_qwen3_vl_model(path, dtype=DTYPES[dtype], device=device)
    return model.eval(), MultimodalCollator.from_pretrained(path), None


def split_answer(sample: Sample) -> tuple[Sample, str]:
    """Split a sample into the conversation before its last answer, and the text of that answer.

    Raises RowFault for a sample that does not end with an answer.
    """
    if sample.messages[-1].role != "assistant" or len(sample.messages) < 2:
        what = "does not end with an answer to compare with; end it with an assistant message"
        raise RowFault(what, kind="missing_field")
    return Sample(sample.messages[:-1], sample.tools, sample.sample_id, sample.media_root), sample.messages[-1].text


def evaluate_answers(
    path: Path,
    data: Path,
    *,
    media_root: Path | None,
    max_new_tokens: int,
    dtype: str | None,
    step: int | None = None,
    best: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a summary (loss, label_tokens, exact_match, num_samples, num_rejected) and one row for each answer.

    The loss is over all labels of a sample; only its last answer is generated. Exact match compares texts without
    outer spaces. Raises ValueError where no row of the file can be used.
    """
    model, collate, chosen = open_model(path, dtype, step=step, best=best)
    device = next(model.parameters()).device
    sources = open_sources(EvalSource(path=str(data), media_root=None if media_root is None else str(media_root)))
    stop_ids = {collate.tokenizer.special_ids[token] for token in ("<|im_end|>", "<|endoftext|>")}
    loss, labels = 0.0, 0
    answers: list[dict[str, Any]] = []
    rejected: list[str] = []
    for group in _grouped(sources, collate, rejected):
        with torch.no_grad():
            loss_sum, num_labels = model(collate.pack([sample for sample, _, _ in group]).to(device))
        loss, labels = loss + loss_sum.item(), labels + num_labels
        prompts = collate.pack([prompt for _, prompt, _ in group]).to(device)
        generated = generate_greedy(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        for (sample, _, expected), ids in zip(group, generated, strict=True):
            answer = collate.decode(ids).strip()
            found = {"answer": answer, "match": answer == expected.strip()}
            answers.append({"id": sample.sample_id, "expected": expected, **found})
    if not answers:
        raise ValueError(f"{data}: no row can be used; the first: {rejected[0] if rejected else 'the file is empty'}")
    summary = {
        "model": str(path),
        "step": chosen and chosen.step,  # of the checkpoint of a run
        "note": chosen and chosen.note,
        "data": str(data),
        "num_samples": len(answers),
        "num_rejected": len(rejected),
        "loss": loss / max(1, labels),
        "label_tokens": labels,
        "exact_match": sum(answer["match"] for answer in answers) / len(answers),
    }
    return summary, answers


def _grouped(
    sources: Sequence[FileSource], collate: MultimodalCollator, rejected: list[str]
) -> Iterator[list[tuple[EncodedSample, EncodedSample, str]]]:
    """Yield (sample, prompt, expected answer) of each row, encoded, in groups of up to MAX_PROMPT_TOKENS."""
    group: list[tuple[EncodedSample, EncodedSample, str]] = []
    tokens = 0
    for source, row in ((file, row) for file in sources for row in range(len(file))):
        try:
            with LAST_RESORT:
                sample = source.sample(row)
                question, expected = split_answer(sample)
                encoded = collate.encode(sample)
                prompt = collate.encode(question, generation_prompt=True)
        except RowFault as fault:
            rejected.append(f"{public_name(source.name)}:{source.row_number(row)}: {fault}")
            continue
        if group and tokens + encoded.input_ids.numel() > MAX_PROMPT_TOKENS:
            yield group
            group, tokens = [], 0
        group.append((encoded, prompt, expected))
        tokens += encoded.input_ids.numel()
    if group:
        yield group
