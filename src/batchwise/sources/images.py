"""Image files as one memory-mapped array. They are decoded and resized once, then kept in a cache."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from rich.progress import MofNCompleteColumn, Progress

from batchwise.host import write_whole

Resize = Literal["crop", "stretch", "pad"]
_RESIZE: dict[str, Callable] = {"crop": ImageOps.fit, "pad": ImageOps.pad, "stretch": Image.Image.resize}
_CHUNK = 2**24  # bytes decoded between two writes
_NAMED = 10  # images named in one line


class ImageFormat(NamedTuple):
    """The format of decoded images: uint8 [channels, height, width].

    Args:
        height: in pixels.
        width: in pixels.
        channels: 3 (RGB) or 1 (grey).
        resize: crop (resize, then cut off both ends of the longer side), stretch, or pad with black.
        white: the value that becomes 255, in images of more than 8 bits; None: there are none.
    """

    height: int
    width: int
    channels: int
    resize: Resize
    white: int | None = None

    @classmethod
    def of(cls, size: int | tuple[int, int], channels: int, resize: Resize) -> "ImageFormat":
        """Return the format for the settings of a data module.

        Raises:
            ValueError: a setting is wrong.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"data.size is {size}: write one number of pixels, or [height, width]")
        if channels not in (1, 3):
            raise ValueError(f"data.channels is {channels}: write 3 (RGB) or 1 (grey)")
        return cls(height, width, channels, resize)

    @property
    def nbytes(self) -> int:
        """Bytes of an image."""
        return self.height * self.width * self.channels

    def decode(self, file: Path | BinaryIO) -> np.ndarray:
        """Return an image as an array, upright even if the camera was held otherwise.

        Raises:
            Exception: of many kinds, if the image cannot be read.
        """
        with Image.open(file) as image:
            mode, size = "L" if self.channels == 1 else "RGB", (self.width, self.height)
            image.draft(mode, (2 * self.width, 2 * self.height))  # spares large JPEGs pixels that resizing would drop
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                if self.white is None:
                    raise ValueError("more than 8 bits per channel: convert it, or write data.white")
                values = (np.asarray(upright, np.float32) * (255 / self.white)).round()
                if values.min() < 0:
                    raise ValueError("values below 0, which would all be black: add a constant to them")
                upright = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            upright = upright.convert(mode)
            if upright.size != size:
                upright = _RESIZE[self.resize](upright, size, Image.Resampling.BICUBIC)
            array = np.asarray(upright)
        return array[None] if self.channels == 1 else array.transpose(2, 0, 1)

    def decode_all(self, files: Sequence[Path | BinaryIO]) -> np.ndarray:
        """Return images as one array uint8 [N, channels, height, width]. To stack them takes a tenth longer."""
        images = np.empty((len(files), self.channels, self.height, self.width), np.uint8)
        for image, file in zip(images, files, strict=True):
            image[...] = self.decode(file)
        return images


def white_of(files: Iterable[Path]) -> int | None:
    """Return the smallest of 2^8 - 1, 2^10 - 1 and so on that images of more than 8 bits do not exceed.

    Such images are often of 12 bits, kept in 16. Floats have no usual range, and do not count. None: there are none.
    """
    largest = 0
    for file in files:
        with contextlib.suppress(Exception), Image.open(file) as image:  # decoding will report it
            if image.mode.startswith("I"):
                largest = max(largest, int(np.asarray(image).max()))
    return next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if largest < 2**bits), 2**32 - 1) if largest else None


def cached_images(
    root: Path, names: list[str], form: ImageFormat, folder: Path, max_unreadable: int = 0
) -> tuple[np.memmap, dict[str, str]]:
    """Return the images, uint8 [N, C, H, W] in a memory map, and the errors of those that cannot be read, by name.

    Images that cannot be read are black.

    The name of the cache is a hash of the names, sizes and times of the files and of the format. One process makes the
    cache while others wait. It goes on where it was interrupted. The file has its name only when it is complete.

    Args:
        root: the folder that names are relative to.
        names: names of the image files.
        form: the format of the decoded images.
        folder: where the cache is.
        max_unreadable: the most images that may be unreadable.

    Raises:
        ValueError: more images cannot be read, or the cache cannot be written.
    """
    content = hashlib.sha256(repr(form).encode())
    for name in names:
        try:
            status = os.stat(root / name)
            content.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except OSError:  # decoding will report it
            content.update(os.fsencode(name) + b"\0")
    images, list_of_unreadable = (folder / f"{content.hexdigest()[:16]}.{kind}" for kind in ("images", "unreadable"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if images.exists() and (damage := _damage(images, list_of_unreadable, len(names) * form.nbytes)):
            print(f"the cache {images} is damaged ({damage}): it is made anew", flush=True)
            images.unlink()
        if not images.exists():
            with _alone(images.with_suffix(".lock")):
                if not images.exists():
                    _decode(root, names, form, images.with_suffix(".part"), list_of_unreadable)
                    _check(names, list_of_unreadable, max_unreadable)
                    images.with_suffix(".part").replace(images)
    except OSError as error:
        needed = len(names) * form.nbytes / 1e9
        raise ValueError(
            f"data.cache {folder} cannot be written ({error.strerror}; {len(names):,} images take {needed:.3f} GB): "
            "make room, or write another folder; what is decoded already is kept"
        ) from error
    unreadable = _check(names, list_of_unreadable, max_unreadable)
    return np.memmap(images, np.uint8, "r", shape=(len(names), form.channels, form.height, form.width)), unreadable


def _damage(images: Path, unreadable: Path, size: int) -> str | None:
    """Return what is wrong with a cache; None: nothing."""
    if images.stat().st_size != size:
        return f"{images.stat().st_size:,} bytes in place of {size:,}"
    return None if _problems(unreadable) is not None else f"{unreadable.name} cannot be read"


def _problems(path: Path) -> dict[str, str] | None:
    """Return why images cannot be read, by name; None: the list of them is lost."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock. The system frees it if the process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process decodes these images into {path.parent}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _decode(root: Path, names: list[str], form: ImageFormat, part: Path, unreadable: Path) -> None:
    """Write all images to `part`, from where it ends. Images that were unreadable are tried again."""
    blank = bytes(form.nbytes)

    def read(name: str) -> tuple[bytes, str | None]:
        try:
            return form.decode(root / name).tobytes(), None
        except Exception as error:
            return blank, str(error).replace(str(root / name), name) or type(error).__name__

    part.touch()
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty())
    task, said = bar.add_task("decoding images", total=len(names)), perf_counter()
    with part.open("r+b") as images, ThreadPoolExecutor() as threads, bar:
        done = images.seek(0, os.SEEK_END) // len(blank)
        if (len(names) - done) * len(blank) > shutil.disk_usage(part).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        problems = _problems(unreadable)
        if problems is None or done > len(names):  # nothing was decoded yet, or it is damaged
            done, problems = images.truncate(0), {}
        again = [number for number in range(done) if names[number] in problems]
        numbers, size = [*again, *range(done, len(names))], max(1, _CHUNK // len(blank))
        for start in range(0, len(numbers), size):
            chunk = numbers[start : start + size]
            read_now = dict(zip(chunk, threads.map(read, (names[number] for number in chunk)), strict=True))
            # The problems are written before the images, so that no image counts as done without its problem.
            problems |= {names[number]: problem for number, (_, problem) in read_now.items() if problem}
            write_whole(unreadable, json.dumps(problems, indent=0))
            for number, (image, _) in read_now.items():
                images.seek(number * len(blank))
                images.write(image)
            images.flush()
            os.fsync(images.fileno())
            for number, (_, problem) in read_now.items():
                if not problem:
                    problems.pop(names[number], None)
            so_far = chunk[-1] + 1
            bar.update(task, completed=so_far)
            if bar.disable and (perf_counter() - said > 10 or so_far == len(names)):  # no terminal: a line at times
                print(f"{so_far:,} of {len(names):,} images decoded", flush=True)
                said = perf_counter()
        write_whole(unreadable, json.dumps(problems, indent=0))


def _check(names: list[str], path: Path, max_unreadable: int) -> dict[str, str]:
    """Return why images cannot be read, by name.

    Raises:
        ValueError: there are too many of them.
    """
    problems = json.loads(path.read_text())
    if len(problems) > max_unreadable:
        some = "; ".join(f"{name} ({problem})" for name, problem in list(problems.items())[:_NAMED])
        rest = f"; and {len(problems) - _NAMED:,} more, listed in {path}" if len(problems) > _NAMED else ""
        raise ValueError(
            f"{len(problems):,} of {len(names):,} images cannot be read: {some}{rest}: repair or delete them, or "
            f"data.max_unreadable {len(problems)} leaves them out"
        )
    return problems
