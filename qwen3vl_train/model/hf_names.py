"""The table between Hugging Face's names of the weights and ours."""

# Hugging Face prefix -> ours. The published spelling of each comes first: it is the one written.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.visual.", "visual.vision."),
    # Older spellings of the same weights: towers at the top level, decoder directly under `model`.
    ("model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("model.lm_head.", "language_model.lm_head."),
    ("visual.", "visual.vision."),
)
_PUBLISHED = _PREFIXES[:3]


def from_huggingface(name: str) -> str | None:
    """Return our name of a stored weight; None for a name that no Qwen3-VL has."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def to_huggingface(name: str) -> str:
    """Return the published name of one of our parameters or modules."""
    for theirs, ours in _PUBLISHED:
        if f"{name}.".startswith(ours):
            return (theirs + f"{name}.".removeprefix(ours)).removesuffix(".")
    raise ValueError(f"{name}: not part of the module tree")
