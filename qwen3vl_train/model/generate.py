"""Greedy generation for evaluation: one packed prefill, then one token of each sequence a pass from the cache."""

import torch

from qwen3vl_train.batch import PackedBatch
from qwen3vl_train.model.attention import CachedAttention
from qwen3vl_train.model.qwen3vl import Qwen3VLForConditionalGeneration


@torch.inference_mode()
def generate_greedy(
    model: Qwen3VLForConditionalGeneration, prompts: PackedBatch, *, max_new_tokens: int, stop_ids: set[int]
) -> list[list[int]]:
    """Continue every sequence of a pack of prompts by its most probable tokens.

    Returns one list of new ids for each sequence, without the stop id that ended it; at most `max_new_tokens` each.
    New positions start at the largest of the prompt's three axes, plus one.
    """
    attention = CachedAttention(prompts.segments, max_new_tokens)
    ends = prompts.segments.cu_seqlens[1:].long() - 1
    hidden_SD = model.hidden_states(prompts, attention).index_select(0, ends)
    per_sequence = prompts.positions.split(prompts.segments.lengths, dim=1)
    next_position = torch.stack([positions.max() + 1 for positions in per_sequence])
    answers: list[list[int]] = [[] for _ in per_sequence]
    running = set(range(len(answers)))
    text = model.language_model.model
    for step in range(max_new_tokens):
        ids = model.language_model.logits(hidden_SD).argmax(dim=-1)
        for sequence, token in enumerate(ids.tolist()):
            if sequence in running and token in stop_ids:
                running.discard(sequence)
            elif sequence in running:
                answers[sequence].append(token)
        if not running or step == max_new_tokens - 1:
            break
        positions = (next_position + step).expand(3, -1)
        hidden_SD = text(text.embed_tokens(ids), positions, attention)
        attention.advance()
    return answers
