"""The cache of decoded images: right pixels, made once, whole or not there, and what cannot be read is named."""

import errno
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from batchwise.sources import images
from batchwise.sources.images import ImageFormat, cached_images

GREY = ImageFormat(4, 4, 1, "stretch")


def picture(path: str, level: int, size: tuple[int, int] = (4, 4), mode: str = "L") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level).save(path)
    return path


def pictures(count: int, folder: str = "pictures") -> list[str]:
    return [picture(f"{folder}/{number}.png", number).removeprefix(f"{folder}/") for number in range(count)]


def levels(array: np.ndarray) -> list[int]:
    assert (array == array[:, :1, :1, :1]).all()
    return array[:, 0, 0, 0].tolist()


def stripes(width: int, height: int) -> BytesIO:
    """An image whose red is its column, and whose green is its row."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0], array[..., 1] = np.arange(width), np.arange(height)[:, None]
    file = BytesIO()
    Image.fromarray(array).save(file, "png")
    file.seek(0)
    return file


def test_pixels_as_they_are() -> None:
    array = ImageFormat(3, 5, 3, "crop").decode(stripes(5, 3))
    assert array.shape == (3, 3, 5)
    assert array[0].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert array[1].tolist() == [[0] * 5, [1] * 5, [2] * 5]


def test_crop_stretch_and_pad() -> None:
    crop, stretch, pad = (ImageFormat(8, 8, 3, how).decode(stripes(32, 16)) for how in ("crop", "stretch", "pad"))  # type: ignore[arg-type]
    assert crop[0, 4].min() >= 7  # a quarter is cut off at either end
    assert crop[0, 4].max() <= 24
    assert stretch[0, 4].min() <= 3
    assert stretch[0, 4].max() >= 28
    assert (pad[:, :2] == 0).all()  # black above
    assert pad[0, 4].max() >= 28


@pytest.mark.parametrize("bits", [8, 16])
def test_an_image_is_turned_as_its_camera_was_held(bits: int) -> None:
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = Image.open(stripes(8, 4))
    if bits == 16:
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16))
    image.save(file, "png", exif=exif)
    file.seek(0)
    assert ImageFormat(8, 4, 3, "crop", white=255).decode(file)[0, :, 0].tolist() == list(range(8))


def test_values_below_0_are_refused() -> None:
    """As of computed tomography. They were all black."""
    file = BytesIO()
    Image.fromarray(np.full((2, 2), -1000, np.int32)).save(file, "tiff")
    file.seek(0)
    with pytest.raises(ValueError, match="values below 0, which would all be black: add a constant"):
        ImageFormat(2, 2, 1, "crop", white=4095).decode(file)


def test_it_is_decoded_once_and_then_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    names = pictures(5)
    array, unreadable = cached_images(Path("pictures"), names, GREY, Path("cache"))
    assert isinstance(array, np.memmap)
    assert levels(array) == [0, 1, 2, 3, 4]
    assert unreadable == {}
    monkeypatch.setattr(ImageFormat, "decode", None)
    assert levels(cached_images(Path("pictures"), names, GREY, Path("cache"))[0]) == [0, 1, 2, 3, 4]


def test_other_content_or_settings_are_another_cache() -> None:
    names = pictures(3)
    cached_images(Path("pictures"), names, GREY, Path("cache"))
    picture("pictures/1.png", 200)
    os.utime("pictures/1.png", ns=(1, 1))
    assert levels(cached_images(Path("pictures"), names, GREY, Path("cache"))[0]) == [0, 200, 2]
    assert cached_images(Path("pictures"), names, GREY._replace(width=2), Path("cache"))[0].shape == (3, 1, 4, 2)
    assert levels(cached_images(Path("pictures"), names[::-1], GREY, Path("cache"))[0]) == [2, 200, 0]
    assert len(list(Path("cache").glob("*.images"))) == 4


def test_unreadable_images_are_named_or_left_out() -> None:
    names = pictures(40)
    whole = Path("pictures/5.png").read_bytes()
    Path("pictures/5.png").write_bytes(whole[: len(whole) // 2])
    Path("pictures/7.png").write_bytes(b"")
    Path("pictures/9.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("pictures/11.png")
    Path("pictures/13.png").unlink()  # it vanishes between listing and reading
    with pytest.raises(ValueError, match=r"^5 of 40 images cannot be read: ") as error:
        cached_images(Path("pictures"), names, GREY, Path("cache"))
    text = str(error.value)
    assert "5.png (" in text
    assert "9.png (cannot identify image file" in text
    assert "11.png (more than 8 bits" in text
    assert "13.png ([Errno 2] No such file" in text
    assert "data.max_unreadable 5" in text
    assert not list(Path("cache").glob("*.images"))
    array, unreadable = cached_images(Path("pictures"), names, GREY, Path("cache"), max_unreadable=5)
    assert sorted(unreadable) == ["11.png", "13.png", "5.png", "7.png", "9.png"]
    assert levels(array) == [0 if number in (5, 7, 9, 11, 13) else number for number in range(40)]
    with pytest.raises(ValueError, match="5 of 40 images"):
        cached_images(Path("pictures"), names, GREY, Path("cache"), max_unreadable=4)


def test_many_unreadable_images_are_listed_in_a_file() -> None:
    names = pictures(30)
    for name in names:
        Path("pictures", name).write_text("")
    with pytest.raises(ValueError, match=r"and 20 more, listed in cache/\w+\.unreadable"):
        cached_images(Path("pictures"), names, GREY, Path("cache"))


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any interruption: here the disk is full after half of the images, and the network is down for a while."""
    monkeypatch.setattr(images, "_CHUNK", 5 * 16)
    names, decode, seen = pictures(20), ImageFormat.decode, []

    def counted(form: ImageFormat, path: Path) -> np.ndarray:
        seen.append(path.name)
        if path.name == "3.png" and seen.count("3.png") == 1:
            raise OSError("the network is down")
        return decode(form, path)

    def full(_: int) -> None:
        if len(seen) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ImageFormat, "decode", counted)
    with monkeypatch.context() as now:
        now.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cache cache cannot be written \(No space left on device; 20 images"):
            cached_images(Path("pictures"), names, GREY, Path("cache"))
    assert not list(Path("cache").glob("*.images"))
    seen[:] = ["3.png"]  # the network is up again
    array, unreadable = cached_images(Path("pictures"), names, GREY, Path("cache"))
    assert levels(array) == list(range(20))
    assert unreadable == {}
    assert len(seen) < 12  # the rest, and the one that could not be read


def test_too_little_room_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="make room, or write another folder"):
        cached_images(Path("pictures"), pictures(20), GREY, Path("cache"))


HALTING = """
import sys, time
from pathlib import Path
from batchwise.sources import images

decode = images.ImageFormat.decode
halted = sys.argv[1]
images.ImageFormat.decode = lambda form, path: (path.stem == halted and time.sleep(600)) or decode(form, path)
images._CHUNK = 8 * 16
names = [f"{number}.png" for number in range(240)]
array, _ = images.cached_images(Path("pictures"), names, images.ImageFormat(4, 4, 1, "stretch"), Path("cache"))
print("levels", array[:, 0, 0, 0].tolist())
"""


def test_several_processes_of_which_one_is_killed() -> None:
    """One decodes and the others wait; when it dies another goes on; all see the same, whole images."""
    pictures(240)

    def start(halted: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-u", "-c", HALTING, halted], stdout=subprocess.PIPE, text=True)

    first = start("200")
    while not any(path.stat().st_size > 400 for path in Path("cache").glob("*.part")):
        assert first.poll() is None
        time.sleep(0.01)
    others = [start("none"), start("none")]
    assert all("waiting" in (other.stdout and other.stdout.readline()) for other in others)  # type: ignore[operator]
    first.kill()
    first.wait()
    for other in others:
        out, _ = other.communicate(timeout=60)
        assert f"levels {list(range(240))}" in out
    assert sorted(path.suffix for path in Path("cache").iterdir() if path.suffix != ".lock") == [
        ".images",
        ".unreadable",
    ]
