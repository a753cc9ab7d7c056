"""Base64 text, file URIs and links of the Hub's cache: what is read, and what stays refused."""

import base64
import contextlib
import io
import random

import pytest
from PIL import Image

from qwen3vl_train.data.errors import MediaFault
from qwen3vl_train.data.media.image import image_size
from qwen3vl_train.data.media.paths import LinkedRoot, describe, is_base64, local_path, path_or_bytes, resolve_path
from tests.helpers.messages import message_of


def encoded(kind: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 90).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_base64_of_an_image_is_an_image(kind, tmp_path):
    data = encoded(kind)
    text = base64.b64encode(data).decode()
    broken = base64.encodebytes(data).decode()
    for written in (text, broken, broken.replace("\n", "\r\n"), f"{text}\n", f"data:image/x;base64,{broken}",
                    f"data:image/x;base64, {text}", f"data:image/x;base64,\n{broken}"):  # fmt: skip
        assert path_or_bytes(written, tmp_path) == data
        assert image_size(written, tmp_path) == (7, 9)
        assert local_path(written, tmp_path) is None
    assert describe(text) == "image in base64"


def test_text_is_a_path_unless_it_is_surely_base64(tmp_path):
    text = base64.b64encode(encoded()).decode()
    for path in ("images/" + text, text[:40], text + "!", text[:-2] + ".png", "iVBORw0KGgo.png",
                 "/9j/" + 60 * "a" + ".jpg", "Qk" + 80 * "a", "", 60 * "a"):  # fmt: skip
        assert not is_base64(path)
    (tmp_path / text[:44]).parent.mkdir(exist_ok=True)
    (tmp_path / text[:44]).write_bytes(encoded())  # a file that is called so is read
    assert path_or_bytes(text[:44], tmp_path) == str(tmp_path / text[:44])
    assert local_path(text[:44], tmp_path) == str(tmp_path / text[:44])
    fault = message_of(MediaFault, path_or_bytes, text[:-3], None)
    assert fault.startswith("image in base64: is not base64 (")
    assert fault.endswith("); encode the image again")


def test_damaged_base64_raises_media_fault_only():
    rng, whole = random.Random(0), base64.encodebytes(encoded()).decode()
    for _ in range(400):
        text = list(rng.choice(["", "data:image/png;base64,"]) + whole)
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice("A/=\n\0é ,:%")
        with contextlib.suppress(MediaFault):
            assert image_size("".join(text)) == (7, 9)


def test_file_uri_is_an_absolute_path(tmp_path):
    root = tmp_path / "my data"
    root.mkdir()
    for name in ("a b.png", "a%20c.png", "é#1.png"):
        (root / name).write_bytes(encoded())
    at = f"file://{root}"
    for uri, name in (
        ((root / "a b.png").as_uri(), "a b.png"), (f"{at}/a b.png", "a b.png"), (f"{at}/a%20c.png", "a%20c.png"),
        ((root / "é#1.png").as_uri(), "é#1.png"), (f"FILE://localhost{root}/a%20b.png", "a b.png"),
    ):  # fmt: skip
        assert path_or_bytes(uri, root) == str(root / name)
        assert local_path(uri, root) == str(root / name)
        assert image_size(uri, None) == (7, 9)
    outside = tmp_path / "secret.png"
    outside.write_bytes(encoded())
    for uri in (outside.as_uri(), f"{at}/../secret.png", f"{at}/%2E%2E/secret.png", f"{at}/%2e%2e%2fsecret.png"):
        fault = f"image {uri}: is outside media_root {root}; move the file into it"
        assert message_of(MediaFault, path_or_bytes, uri, root) == fault
    for uri, host in (("file://server/a.png", "server"), ("file://a.png", "a.png")):
        fault = f"image {uri}: names the machine '{host}'; write file:///folder/file, or the path alone"
        assert message_of(MediaFault, path_or_bytes, uri, root) == fault
    assert "is a file URL and nothing is downloaded" in message_of(
        MediaFault, path_or_bytes, "file:///etc/passwd::hf://x", root
    )
    assert local_path("file://server/a.png", "/r") == "/r/file://server/a.png"


@pytest.fixture
def hub(tmp_path):
    """The cache of two repositories: their pictures are links from a snapshot to a blob."""
    for name in ("datasets--me--set", "datasets--me--other"):
        folder = tmp_path / name
        (folder / "snapshots" / "abc" / "images").mkdir(parents=True)
        (folder / "blobs").mkdir()
        (folder / "blobs" / "1111").write_bytes(encoded())
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_bytes(encoded())
        (folder / "snapshots" / "abc" / "images" / "a.png").symlink_to("../../../blobs/1111")
        (folder / "snapshots" / "abc" / "direct.png").symlink_to("../../blobs/1111")
    return tmp_path


def test_links_of_the_hubs_cache_are_its_files(hub):
    snapshot = hub / "datasets--me--set" / "snapshots" / "abc"
    blob = str(hub / "datasets--me--set" / "blobs" / "1111")
    assert resolve_path("images/a.png", snapshot) == resolve_path("direct.png", snapshot) == blob
    assert resolve_path("a.png", snapshot / "images") == blob
    (hub / "alias").symlink_to(snapshot)
    assert resolve_path("images/a.png", hub / "alias") == blob
    assert image_size("images/a.png", snapshot) == (7, 9)


def test_other_links_out_of_the_hubs_cache_are_refused(hub):
    one, other = (hub / name / "snapshots" / "abc" for name in ("datasets--me--set", "datasets--me--other"))
    secret = hub / "secret.png"
    secret.write_bytes(encoded())
    (hub / "datasets--me--set" / "blobs" / "2222").symlink_to(secret)
    targets = {
        "out.png": secret, "other.png": other.parents[1] / "blobs" / "1111",
        "chain.png": one.parents[1] / "blobs" / "2222",
        "refs.png": one.parents[1] / "refs" / "main", "near.png": hub / "datasets--me--setting" / "blobs" / "1",
        "up.png": one.parents[1] / "blobs" / ".." / ".." / "secret.png",
    }  # fmt: skip
    for name, target in targets.items():
        (one / name).symlink_to(target)
        fault = f"image {name}: is a link to {(one / name).resolve()}, outside media_root {one}"
        fault += "; set data.follow_links: true if the link is yours, or copy the file into it"
        assert message_of(MediaFault, resolve_path, name, one) == fault
    for path in ("../../blobs/1111", str(one.parents[1] / "blobs" / "1111"), "../def/a.png"):
        fault = f"image {path}: is outside media_root {one}; move the file into it"
        assert message_of(MediaFault, resolve_path, path, one) == fault
    plain = hub / "plain"
    (plain / "snapshots" / "abc").mkdir(parents=True)
    (plain / "blobs").mkdir()
    (plain / "blobs" / "1").write_bytes(encoded())
    (plain / "snapshots" / "abc" / "a.png").symlink_to("../../blobs/1")  # not a folder of the Hub
    assert "is a link to" in message_of(MediaFault, resolve_path, "a.png", plain / "snapshots" / "abc")


def test_links_of_a_user_are_followed_where_the_recipe_says_so(tmp_path):
    """`..` after a link is the folder of the link, not of its target: nothing beside the target is reached."""
    far, root = tmp_path / "nfs" / "coco", tmp_path / "images"
    far.mkdir(parents=True)
    root.mkdir()
    (far / "a.png").write_bytes(encoded())
    (far.parent / "secret.png").write_bytes(encoded())
    (root / "coco").symlink_to(far)
    (root / "a.png").symlink_to(far / "a.png")
    for path in ("coco/a.png", "a.png", str(root / "coco" / "a.png")):
        assert resolve_path(path, LinkedRoot(root)) == str(far / "a.png")
        assert "; set data.follow_links: true if the link is yours" in message_of(MediaFault, resolve_path, path, root)
    assert resolve_path("coco/../secret.png", LinkedRoot(root)) == str(root / "secret.png")
    for path in ("../nfs/secret.png", "coco/../../nfs/secret.png", str(far / "a.png")):
        message = message_of(MediaFault, resolve_path, path, LinkedRoot(root))
        assert message.endswith(f"is outside media_root {root}; move the file into it")
    (tmp_path / "alias").symlink_to(far)
    assert resolve_path("a.png", tmp_path / "alias") == str(far / "a.png")  # the root itself may be a link
