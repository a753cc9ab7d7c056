"""Marks of media in texts: our placeholders `<image>` and `<video>`, and the marks of other model families.

A mark of another family that nothing replaces would be trained as letters, while its picture is missing or elsewhere.
Qwen's own markup (`<|vision_start|><|image_pad|>...`) is not among them: typed into a text, it stays that text.
"""

import re
from typing import NamedTuple

_IMAGE_MARKS = (
    r"(?:<img>)?(?:<IMG_CONTEXT>)+(?:</img>)?",  # InternVL, XTuner
    r"\(<image>\./</image>\)",  # MiniCPM-V
    r"<im_start><image><im_end>", r"(?:<im_patch>)+",  # LLaVA 1.0
    r"<fake_token_around_image>(?:<global-img>)?<image><fake_token_around_image>",  # Idefics 2, SmolVLM
    r"<\|image\|>",  # Llama 3.2 Vision, mPLUG-Owl, GLM-4V
    r"<start_of_image>", r"(?:<image_soft_token>)+",  # Gemma 3
    r"\[IMG\]",  # Pixtral
    r"<ImageHere>",  # InternLM-XComposer
    r"<image_placeholder>",  # DeepSeek-VL, Janus
    r"<\|media_pad\|>",  # Kimi-VL
)  # fmt: skip
_VIDEO_MARKS = (r"(?:<VIDEO_CONTEXT>)+", r"<\|video\|>", r"<video_placeholder>")
_PATTERN = re.compile(
    "|".join(
        (
            r"<img>(?P<path>[^<>\n]+)</img>",  # Qwen-VL 1
            r"<image[ _]?(?P<number>\d{1,3})>|<\|image_(?P<piped>\d{1,3})\|>",  # MMMU, Phi-3 Vision
            rf"(?P<image>{'|'.join(_IMAGE_MARKS)})",
            rf"(?P<video>{'|'.join(_VIDEO_MARKS)})",
            r"<(?P<ours>image|video)>",
        )
    )
)


class Mark(NamedTuple):
    """One mark of a text.

    kind: "image" or "video".
    text: the mark as it is written.
    is_ours: it is `<image>` or `<video>`.
    number: the medium that it names among those of its row, counted from 1; None: the next one.
    path: the file that it names itself.
    """

    kind: str
    text: str
    is_ours: bool = False
    number: int | None = None
    path: str | None = None


def split_marks(text: str) -> list[str | Mark]:
    """Split a text at its marks. "Is <image> red?" -> "Is ", Mark("image", "<image>"), " red?" """
    if "<" not in text and "[IMG]" not in text:
        return [text]
    pieces: list[str | Mark] = []
    end = 0
    for match in _PATTERN.finditer(text):
        pieces += [text[end : match.start()], _mark(match)]
        end = match.end()
    return [*pieces, text[end:]]


def foreign_marks(text: str) -> list[str]:
    """Return the marks of other model families in a text, in order."""
    return [piece.text for piece in split_marks(text) if isinstance(piece, Mark) and not piece.is_ours]


def is_mark(text: str) -> bool:
    """Return whether a text is one mark and nothing else."""
    return _PATTERN.fullmatch(text) is not None


def _mark(match: re.Match[str]) -> Mark:
    found, text = match.groupdict(), match[0]
    if found["ours"]:
        return Mark(found["ours"], text, is_ours=True)
    number = found["number"] or found["piped"]
    return Mark(
        "video" if found["video"] else "image", text, number=int(number) if number else None, path=found["path"]
    )
