"""Checks a data set from end to end: index, tar members, checksums, and that every GOP decodes on its own."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import google_crc32c
import pyarrow.compute as pc

from . import engines
from .shards import Corrupt, Dataset, Payload, Video, digest_of, gop_table, tar_name
from .video import decode_frames


@dataclass(frozen=True)
class Problem:
    """Something that is not as the index says. key is empty where a whole file is concerned."""

    file: str
    key: str
    what: str


def verify(
    path: Path, *, workers: int, on_start: Callable[[int], None] = lambda videos: None,
    on_videos: Callable[[int], None] = lambda count: None,
) -> list[Problem]:  # fmt: skip
    """Every problem of the data set, sorted; an empty list means that all of it is sound.

    Reads every byte and decodes every GOP by itself. Raises UserError if `path` is no finished data set.
    """
    dataset = Dataset.open(path)
    on_start(dataset.table.num_rows)
    problems: list[Problem] = []
    index = (dataset.path / "index.parquet").read_bytes() if (dataset.path / "index.parquet").is_file() else b""
    if digest_of(index) != dataset.info["index_digest"]:
        problems.append(Problem("index.parquet", "", "is missing, or not the file that dataset.json describes"))
    counted = {split: entry["videos"] for split, entry in dataset.info["splits"].items()}
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(dataset.table["split"]).to_pylist()}
    if counted != found:
        problems.append(Problem("dataset.json", "", f"counts {counted} videos by split, the index {found}"))
    shard_names = sorted(set(dataset.table["shard"].to_pylist()))
    tasks = [(str(dataset.path), name) for name in shard_names]
    for result in engines.run_local(_verify_shard, tasks, min(workers, len(tasks)), on_videos):
        problems += result or []
    return sorted(problems, key=lambda problem: (problem.file, problem.key))


def _verify_shard(task: tuple[str, str], report: engines.Report) -> list[Problem]:
    folder, name = task
    dataset = Dataset.open(folder)
    rows = pc.indices_nonzero(pc.equal(dataset.table["shard"], name)).to_pylist()
    path = dataset.path / "shards" / name
    problems = []
    try:
        with tarfile.open(path) as tar:
            members = {member.offset_data: member for member in tar}
    except (OSError, tarfile.TarError) as error:
        return [Problem(name, "", f"cannot be read as a tar file ({error})")]
    with open(path, "rb") as file:
        for row in rows:
            try:
                video = dataset.video(row)
                member = members.get(video.offset)
                if member is None or (member.name, member.size) != (f"{tar_name(video.key)}.mp4", video.size):
                    raise Corrupt("the tar has no such member where the index says")
                file.seek(video.offset)
                _check_payload(video, file.read(video.size))
            except Corrupt as problem:
                key = dataset.table["key"][row].as_py()
                problems.append(Problem(name, key, str(problem)))
            report(1)
    return problems


def _check_payload(video: Video, data: bytes) -> None:
    if google_crc32c.value(data) != video.crc32c:
        raise Corrupt("its checksum does not match the index")
    payload = Payload(io.BytesIO(data), 0)
    payload.size = len(data)
    header, offsets = gop_table(payload.boxes(), len(data))
    if header != video.header_size or offsets != video.gop_offsets.tolist():
        raise Corrupt("its GOP table does not match the payload's fragments")
    starts = video.gop_frames.tolist()
    if len(starts) != len(offsets) or starts[0] != 0 or starts[-1] != video.num_frames:
        raise Corrupt("its GOP frame numbers do not match its frames")
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        piece = data[:header] + data[offsets[number] : offsets[number + 1]]
        try:
            frames = [(frame.width, frame.height) for frame in decode_frames(io.BytesIO(piece))]
        except av.FFmpegError as error:
            raise Corrupt(f"GOP {number} does not decode ({error.strerror})") from None
        if len(frames) != last - first:
            raise Corrupt(f"GOP {number} holds {len(frames)} frames, the index says {last - first}")
        if set(frames) != {(video.width, video.height)}:
            raise Corrupt(f"GOP {number} is not {video.width}x{video.height}")
