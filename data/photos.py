"""Write two photos of scikit-learn as small data sets in the forms people have: `python data/photos.py --out DIR`.

A pagoda by a lake and a flower (640x427), and crops of both, with boxes drawn by hand that move with the crops:

    DIR/images/*.jpg
    DIR/llava.json         LLaVA's form: an array of conversations with <image>, which Qwen's own scripts also read
    DIR/grounding.jsonl    boxes and points in pixels, one `<box>` or `<point>` in the text for each

Two photos teach a model nothing about the world; they show the form of the rows, and that a loss on them falls.
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from digits import jsonl_bytes, run_script, write_if_changed
from PIL import Image
from sklearn.datasets import load_sample_images

SEED = 0
NUM_CROPS = 24
Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels."""

# Drawn by eye on the photos. The point is the middle of the thing.
BOXES: dict[str, tuple[str, Box, tuple[int, int]]] = {
    "china": ("pagoda", (63, 29, 372, 418), (206, 41)),
    "flower": ("flower", (168, 84, 445, 358), (306, 222)),
}
POINTS = {"pagoda": "the tip of the roof", "flower": "the heart of the flower"}
ABOUT = {
    "china": [
        ("What is in this photo?", "A pagoda of several storeys by a lake."),
        ("What lies behind it?", "A lake."),
    ],
    "flower": [("What is in this photo?", "A round orange flower."), ("Is its background light or dark?", "Dark.")],
}


def photos() -> dict[str, np.ndarray]:
    """Return the photos by name, uint8 (427, 640, 3)."""
    found = load_sample_images()
    return {Path(name).stem: image for name, image in zip(found.filenames, found.images, strict=True)}


def crops(name: str, size: tuple[int, int]) -> list[Box]:
    """Return the whole photo and crops of it that contain its box, always the same ones. size: (width, height)."""
    rng = np.random.default_rng([SEED, len(name)])
    width, height = size
    x1, y1, x2, y2 = BOXES[name][1]
    cuts = [(0, 0, width, height)]
    for _ in range(NUM_CROPS - 1):
        left, top = rng.integers(0, x1 + 1), rng.integers(0, y1 + 1)
        cuts.append((int(left), int(top), int(rng.integers(x2, width + 1)), int(rng.integers(y2, height + 1))))
    return cuts


def conversation(image: str, pairs: list[tuple[str, str]]) -> dict:
    """Build one row in LLaVA's form, with the image before the first question."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def grounding(image: str, name: str, cut: Box) -> list[dict]:
    """Build two rows about one crop: one asks for the box of the thing, the other for a point of it."""
    label, box, point = BOXES[name]
    left, top = cut[:2]
    common = {"image": image, "bbox": "pixel"}
    box_answer, point_answer = (
        f'[{{"bbox_2d": <box>, "label": "{label}"}}]',
        f'[{{"point_2d": <point>, "label": "{label}"}}]',
    )
    return [
        {**common, "boxes": [[box[0] - left, box[1] - top, box[2] - left, box[3] - top]],
         "question": f"Locate the {label} and report its box as JSON.", "answer": box_answer},
        {**common, "points": [[point[0] - left, point[1] - top]],
         "question": f"Point at {POINTS[label]} and report it as JSON.", "answer": point_answer},
    ]  # fmt: skip


def write_photos(folder: Path) -> int:
    """Write everything that is not there, and return how many files were written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    conversations, groundings, written = [], [], 0
    for name, image in photos().items():
        for number, cut in enumerate(crops(name, (image.shape[1], image.shape[0]))):
            path = f"images/{name}-{number:02d}.jpg"
            out = BytesIO()
            Image.fromarray(image).crop(cut).save(out, "JPEG", quality=90)
            written += write_if_changed(folder / path, out.getvalue())
            conversations.append(conversation(path, ABOUT[name]))
            groundings += grounding(path, name, cut)
    written += write_if_changed(folder / "llava.json", json.dumps(conversations, indent=1).encode())
    return written + write_if_changed(folder / "grounding.jsonl", jsonl_bytes(groundings))


if __name__ == "__main__":
    run_script("Write two photos as LLaVA JSON and as rows with boxes.", lambda folder: {"files": write_photos(folder)})
