"""The types of one checked conversation. They know no template, no token and no pixel."""

from dataclasses import dataclass
from typing import Any

from qwen3vl_train.data.media.budgets import NO_LIMITS, PixelLimits
from qwen3vl_train.data.media.paths import ImageInput, VideoInput

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: ImageInput
    limits: PixelLimits = NO_LIMITS


@dataclass(frozen=True)
class VideoPart:
    """A clip: a video file (path, data URI or bytes), or frames as images: a list of them, or the path of their folder.

    Frames need one of fps, sample_fps and timestamps; a video file takes none of them.

    fps: frame rate of the frames, which are then sampled like those of a video file. Rows write it like the target_fps
        of a video file: target_fps alone is the frame rate of a folder.
    sample_fps: rate at which the frames are sampled already; all of them are used, the second one is at 1 / sample_fps.
    timestamps: seconds of frames that are sampled already; all of them are used.
    start, end: seconds of the clip between which frames are taken; None: from its beginning, to its end. The times in
        the text still count from the beginning of the file, as those that qwen-vl-utils passes on for video_start: its
        `_read_video_decord` gives frame indices of the whole file, which Qwen3VLProcessor divides by the rate.
    target_fps: frames sampled per second, in place of the recipe's.
    num_frames: number of sampled frames, in place of a rate; at most the recipe's max_frames and what the clip has.
    """

    video: VideoInput | tuple[ImageInput, ...]
    fps: float | None = None
    timestamps: tuple[float, ...] | None = None
    sample_fps: float | None = None
    start: float | None = None
    end: float | None = None
    target_fps: float | None = None
    num_frames: int | None = None
    limits: PixelLimits = NO_LIMITS


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
    ignored: keys of the row, its turns and its parts that were not used, as "turn.recipient", each once.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    sample_id: str = "sample"
    media_root: str | None = None
    row_format: str = "openai"
    ignored: tuple[str, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """The parts of all messages, in order."""
        return [part for message in self.messages for part in message.content]
