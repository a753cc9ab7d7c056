"""Turn patches back into the picture that the model sees, as a data URI."""

import base64
from io import BytesIO
from typing import Any

from PIL import Image
from torch import Tensor

from qwen3vl_train.data.encode.encoder import EncodedSample
from qwen3vl_train.data.media.image import MERGE, PATCH

_LOSSLESS_PIXELS = 128 * 128  # above this, JPEG: a page of large PNGs would be too heavy to open
_LONGEST_SIDE = 1600
_MOST_FRAMES = 16


def view_frames(encoded: EncodedSample) -> list[dict[str, Any]]:
    """Return the frames of a sample: medium and frame (from 0), size in pixels, tokens (rows x cols), first token, src.

    Of a long clip, evenly spread ones.
    """
    slices = iter(encoded.slices)
    frames = []
    for medium, (count, height, width) in enumerate(encoded.grids):
        shown = {round(place * (count - 1) / max(1, min(count, _MOST_FRAMES) - 1)) for place in range(_MOST_FRAMES)}
        for frame in range(count):
            offset, length, row = next(slices)
            assert length == height * width // MERGE**2, f"slice of {length} tokens for {height}x{width} patches"
            if frame in shown:
                patches = encoded.patches[row * MERGE**2 : (row + length) * MERGE**2]
                frames.append(
                    {
                        "medium": medium,
                        "frame": frame,
                        "frames": count,
                        "width": width * PATCH,
                        "height": height * PATCH,
                        "rows": height // MERGE,
                        "cols": width // MERGE,
                        "offset": offset,
                        "src": data_uri(unpatch(patches, height, width)),
                    }
                )
    return frames


def unpatch(patches: Tensor, rows: int, cols: int) -> Image.Image:
    """Put the patches of one frame together: the inverse of `media.resize_to_patches`.

    patches: uint8 (rows * cols, 768), or (rows * cols, 1536) for a pair of frames, of which the first is shown.
    """
    still = patches.reshape(patches.shape[0], 3, -1, PATCH, PATCH)[:, :, 0]
    blocks = still.reshape(rows // MERGE, cols // MERGE, MERGE, MERGE, 3, PATCH, PATCH)
    pixels = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * PATCH, cols * PATCH, 3)
    return Image.fromarray(pixels.numpy())


def data_uri(image: Image.Image) -> str:
    """Encode as PNG where small, else as JPEG; beyond 1600 pixels a side, shrunk."""
    small = image.width * image.height <= _LOSSLESS_PIXELS
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    out = BytesIO()
    image.save(out, format="PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
