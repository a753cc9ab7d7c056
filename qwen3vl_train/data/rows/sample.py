"""The types of one checked conversation. They know no template, no token and no pixel."""

from dataclasses import dataclass
from typing import Any

from qwen3vl_train.data.media.paths import ImageInput, VideoInput

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: ImageInput


@dataclass(frozen=True)
class VideoPart:
    """A clip: a video file (path, data URI or bytes), or a list of frames as images with fps or timestamps.

    fps: frame rate of the list of frames, which are then sampled like those of a video file.
    timestamps: seconds of frames that are sampled already; all of them are used.
    """

    video: VideoInput | tuple[ImageInput, ...]
    fps: float | None = None
    timestamps: tuple[float, ...] | None = None


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class ToolCall:
    """arguments: a string is rendered as it is, anything else as JSON."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """One turn. loss_weight: 0 where the turn is not trained, as for all but assistant turns."""

    role: str
    content: tuple[Part, ...]
    loss_weight: float = 0.0
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts, concatenated without media."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


@dataclass(frozen=True)
class Sample:
    """A conversation.

    sample_id: its name in messages, like `train.jsonl:17`.
    media_root: the folder that its media paths may not leave.
    row_format: the format of its row, one of `formats.FORMATS`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    sample_id: str = "sample"
    media_root: str | None = None
    row_format: str = "openai"

    @property
    def parts(self) -> list[Part]:
        """The parts of all messages, in order."""
        return [part for message in self.messages for part in message.content]
