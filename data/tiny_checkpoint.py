"""Write a tiny, untrained Qwen3-VL checkpoint in Hugging Face form: `python data/tiny_checkpoint.py --out DIR`.

The folder has the files, names and config dialect of the released checkpoints (as transformers 4.57 wrote them, which
every later version loads), so whatever reads a real one reads this one. Only the sizes and the vocabulary are small:
the tokenizer is trained here, in a second, and knows Qwen3-VL's markup. Its token ids differ from the released ones.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

ASSETS = Path(__file__).resolve().parent / "assets"

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids. Decoding with skip_special_tokens drops the first group and keeps the second.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
ADDED_TOKENS = tuple((token, True) for token in SPECIAL_TOKENS) + tuple((token, False) for token in PLAIN_ADDED_TOKENS)

PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE = 16, 2, 2
MAX_POSITIONS = 4096


def default_texts() -> list[str]:
    """Read the text that the tokenizer is trained on when no other is given."""
    return [(ASSETS / "tokenizer_text.txt").read_text(encoding="utf-8")]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE as Qwen's is built: NFC, Qwen's split pattern, the 26 added tokens after the trained ones.

    vocab_size: number of entries (256 bytes, merges, added tokens); there are fewer if the texts run out of pairs.
    The same texts and size give the same tokenizer. Raises ValueError if vocab_size is too small for the bytes.
    """
    smallest = 256 + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: {vocab_size} is too small; bytes and added tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in ADDED_TOKENS])
    return tokenizer


def tiny_config(
    tokenizer: Tokenizer,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vision_hidden_size: int = 64,
    vision_depth: int = 4,
    vision_num_heads: int = 2,
    num_position_embeddings: int = 64,
    deepstack_visual_indexes: tuple[int, ...] = (0, 1, 2),
    tie_word_embeddings: bool = True,
) -> dict[str, Any]:
    """Build config.json in the published dialect with every number written out (transformers has other defaults).

    The embedding has more rows than the tokenizer has entries, as in the released checkpoints. M-RoPE sections keep the
    released proportion 24:20:20 as near as head_dim / 2 allows. num_position_embeddings is a square: the learned table.
    """
    token_id = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    height = width = head_dim // 2 * 20 // 64
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_id["<|endoftext|>"],
        "dtype": "float32",
        "eos_token_id": token_id["<|im_end|>"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [head_dim // 2 - height - width, height, width],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": tie_word_embeddings,
        "use_cache": True,
        "vocab_size": 64 * (tokenizer.get_vocab_size() // 64 + 1),
    }
    vision = {
        "deepstack_visual_indexes": list(deepstack_visual_indexes),
        "depth": vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision_hidden_size,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4 * vision_hidden_size,
        "model_type": "qwen3_vl",
        "num_heads": vision_num_heads,
        "num_position_embeddings": num_position_embeddings,
        "out_hidden_size": hidden_size,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "dtype": "float32",
        "image_token_id": token_id["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": tie_word_embeddings,
        "transformers_version": "4.57.0",
        "video_token_id": token_id["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": token_id["<|vision_end|>"],
        "vision_start_token_id": token_id["<|vision_start|>"],
    }


def _linear(name: str, out_features: int, in_features: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision_shapes(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    kernel = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield "model.visual.patch_embed.proj.weight", (hidden, *kernel)
    yield "model.visual.patch_embed.proj.bias", (hidden,)
    yield "model.visual.pos_embed.weight", (vision["num_position_embeddings"], hidden)
    for index in range(vision["depth"]):
        block = f"model.visual.blocks.{index}"
        yield from _layer_norm(f"{block}.norm1", hidden)
        yield from _layer_norm(f"{block}.norm2", hidden)
        yield from _linear(f"{block}.attn.qkv", 3 * hidden, hidden, bias=True)
        yield from _linear(f"{block}.attn.proj", hidden, hidden, bias=True)
        yield from _linear(f"{block}.mlp.linear_fc1", inner, hidden, bias=True)
        yield from _linear(f"{block}.mlp.linear_fc2", hidden, inner, bias=True)
    merged = hidden * vision["spatial_merge_size"] ** 2
    mergers = [("model.visual.merger", hidden)]  # normalises before 2x2 patches become one row, the others after
    mergers += [
        (f"model.visual.deepstack_merger_list.{k}", merged) for k in range(len(vision["deepstack_visual_indexes"]))
    ]
    for merger, norm_width in mergers:
        yield from _layer_norm(f"{merger}.norm", norm_width)
        yield from _linear(f"{merger}.linear_fc1", merged, merged, bias=True)
        yield from _linear(f"{merger}.linear_fc2", vision["out_hidden_size"], merged, bias=True)


def _text_shapes(text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head_dim = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    q_width, kv_width = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    yield "model.language_model.embed_tokens.weight", (text["vocab_size"], hidden)
    for index in range(text["num_hidden_layers"]):
        layer = f"model.language_model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield from _linear(f"{layer}.self_attn.q_proj", q_width, hidden, bias=False)
        yield from _linear(f"{layer}.self_attn.k_proj", kv_width, hidden, bias=False)
        yield from _linear(f"{layer}.self_attn.v_proj", kv_width, hidden, bias=False)
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, q_width, bias=False)
        yield from _linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", inner, hidden, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
    yield "model.language_model.norm.weight", (hidden,)


def initial_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Draw fresh float32 weights under the published names; the same seed gives the same weights.

    Norms are 1 and biases 0. Matrices, and the patch embedding seen as one, are normal with std 1/sqrt(fan-in); tables
    with std 1/sqrt(width), so that a tied head can predict every token: with 0.02 a token that the first task never
    contained keeps a row too short to be predicted, and no adapter on a frozen embedding can learn to write it.
    lm_head.weight is written only when it is not tied to the embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [*_vision_shapes(config["vision_config"]), *_text_shapes(config["text_config"])]
    if not config["tie_word_embeddings"]:
        shapes.append(("lm_head.weight", (config["text_config"]["vocab_size"], config["text_config"]["hidden_size"])))
    tensors = {}
    for name, shape in shapes:
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    return tensors


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_processor_files(
    folder: Path, tokenizer: Tokenizer, *, min_pixels: int, max_pixels: int, template: str = "instruct"
) -> None:
    """Write the files beside config.json and the weights: tokenizer, chat template, pixel limits, sampling.

    min_pixels, max_pixels: limits of one image after resizing; an image costs its pixels / 1024 in tokens.
    template: 'instruct' or 'thinking'.
    """
    chat_template = (ASSETS / f"chat_template_{template}.jinja").read_text(encoding="utf-8")
    pad, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": special}
        for token, special in ADDED_TOKENS
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    pixels = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {"size": {"longest_edge": max_pixels, "shortest_edge": min_pixels}, **pixels}
    video = {"size": {"longest_edge": 4 * max_pixels, "shortest_edge": min_pixels}, **pixels}
    sampling = {"do_sample": True, "repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    ids = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "chat_template.json", {"chat_template": chat_template})
    _write_json(folder / "preprocessor_config.json", {**image, "image_processor_type": "Qwen2VLImageProcessorFast"})
    _write_json(folder / "video_preprocessor_config.json", {**video, "video_processor_type": "Qwen3VLVideoProcessor"})
    _write_json(folder / "generation_config.json", {**ids, **sampling, "transformers_version": "4.57.0"})


def write_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    texts: Iterable[str] | None = None,
    vocab_size: int = 512,
    min_pixels: int = 64 * 64,
    max_pixels: int = 512 * 512,
    template: str = "instruct",
    **sizes: Any,
) -> dict[str, Any]:
    """Write the checkpoint folder and return its config. A 64x64 image costs 4 tokens under the default limits.

    texts: what the tokenizer is trained on (default: `default_texts`). sizes: the keywords of `tiny_config`.
    Replaces files of the same names; other files in the folder stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(default_texts() if texts is None else texts, vocab_size)
    config = tiny_config(tokenizer, **sizes)
    write_processor_files(folder, tokenizer, min_pixels=min_pixels, max_pixels=max_pixels, template=template)
    _write_json(folder / "config.json", config)
    save_file(initial_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny, untrained Qwen3-VL checkpoint in Hugging Face form.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights (default 0)")
    arguments = parser.parse_args()
    config = write_tiny_checkpoint(arguments.out, seed=arguments.seed)
    weights = arguments.out / "model.safetensors"
    print(
        f"{arguments.out}: an untrained Qwen3-VL, {config['vision_config']['depth']} vision blocks, "
        f"{config['text_config']['num_hidden_layers']} decoder layers, "
        f"{config['text_config']['vocab_size']} token rows, {weights.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
