"""Opens a source as an FFmpeg container and picks its video stream."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path

import av

from .sources import SourceVideo

FRAME_NAME = "image_%05d.jpg"
MAX_PIXELS = 139_264 * 256  # a picture of H.264's highest level, 6.2: 8192x4352; what a damaged header says is more


class VideoError(Exception):
    """A source that cannot be converted: the stage that failed (open, decode, encode) and the reason."""

    def __init__(self, stage: str, reason: str):
        super().__init__(stage, reason)
        self.stage, self.reason = stage, reason

    def __str__(self) -> str:
        return self.reason


# Faults of the machine and not of the source: they stop the run, which can be continued when they are mended.
_MACHINE = frozenset([errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT])


def refuse_machine_fault(error: Exception, path: str, also: Collection[int] = ()) -> None:
    """Raises OSError where an error says nothing about the source, so that it is not rejected for it."""
    number = getattr(error, "errno", None)
    if number is not None and (number in _MACHINE or number in also):
        raise OSError(number, os.strerror(number), path) from None


@contextlib.contextmanager
def open_container(video: SourceVideo) -> Iterator[av.container.InputContainer]:
    """A source as a container with a video stream. Raises VideoError."""
    options: dict = {}
    path: str | io.BufferedIOBase = video.path
    with contextlib.ExitStack() as stack:
        try:
            if require_readable(video.path):
                frame_files(video.path)
                path = str(Path(video.path.replace("%", "%%"), FRAME_NAME))
                options = {"format": "image2", "options": {"framerate": str(given_rate(video)), "start_number": "1"}}
            if video.span:
                path = stack.enter_context(io.BufferedReader(_Span(video.path, *video.span)))
            container = stack.enter_context(av.open(path, metadata_errors="replace", **options))
        except (av.FFmpegError, OSError, ValueError) as error:
            refuse_machine_fault(error, video.path)
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(
                "open", f"not a video that FFmpeg can read, or cut off before its index ({reason})"
            ) from None
        video_stream(container)
        yield container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The best video stream by FFmpeg's rule (default, then size), never a cover picture. Raises VideoError."""
    pictures = {stream.index for stream in container.streams.video if stream.disposition & _ATTACHED}
    stream = container.streams.best("video")
    if stream is not None and stream.index in pictures:
        moving = (other for other in container.streams.video if other.index not in pictures and other.codec_context)
        stream = max(moving, key=lambda other: other.width * other.height, default=None)
    if not isinstance(stream, av.VideoStream):
        kinds = {"cover picture" if stream.index in pictures else stream.type for stream in container.streams}
        raise VideoError("open", f"no video stream in the file (it holds {', '.join(sorted(kinds)) or 'nothing'})")
    if stream.codec_context is None:
        raise VideoError("open", "the video has a codec that FFmpeg does not know")
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError("open", f"frames of {stream.width}x{stream.height}, more than any codec's level allows")
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    stream.codec_context.thread_count = 1
    return stream


def declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says that the video stream is; 0 where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match:
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    # The container's own length may be that of another stream.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def given_rate(video: SourceVideo) -> Fraction:
    """The frame rate that came with the source. Raises VideoError if none did."""
    if not video.fps:
        raise VideoError("open", "frames without a video state no frame rate; give it with --source-fps")
    return Fraction(video.fps).limit_denominator(1001)


def require_readable(path: str) -> bool:
    """Whether path is a folder. Raises VideoError for what is neither a folder nor a file with content.

    A pipe would be waited for without end.
    """
    try:
        state = os.stat(path)
        if stat.S_ISREG(state.st_mode):
            os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        raise VideoError("open", "no permission to read the file") from None
    except FileNotFoundError:
        raise VideoError("open", "the file is gone, or its link points nowhere") from None
    except OSError as error:
        refuse_machine_fault(error, path, also=(errno.EIO, errno.ENOMEM))
        raise VideoError("open", f"the file cannot be opened ({error.strerror})") from None
    if stat.S_ISDIR(state.st_mode):
        return True
    if not stat.S_ISREG(state.st_mode):
        raise VideoError("open", "a pipe, socket or device, not a file")
    if not state.st_size:
        raise VideoError("open", "the file is empty")
    return False


def frame_files(folder: str) -> int:
    """How many numbered frames a folder holds. Raises VideoError if one is missing, or no file: a pipe has no end."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file() for entry in entries if re.fullmatch(r"image_\d{5,}\.jpg", entry.name)}
    for number in range(1, len(found) + 1):
        name = FRAME_NAME % number
        if not found.get(name):
            what = "no file, or a link that points nowhere" if name in found else "missing"
            raise VideoError("open", f"{name} is {what}; {len(found)} frames are there")
    if not found:
        raise VideoError("open", f"a folder without frames named {FRAME_NAME % 1} and so on")
    return len(found)


_ATTACHED = av.stream.Disposition.attached_pic


class _Span(io.RawIOBase):
    """`size` bytes of a file from `offset`, as a file of their own."""

    def __init__(self, path: str, offset: int, size: int):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), left))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
