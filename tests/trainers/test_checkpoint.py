import errno
import threading
import time

import pytest
import torch

from genkd.errors import UserError
from genkd.trainers import checkpoint


def load_newest(folder):
    path = checkpoint.newest_sound(folder)
    return path and checkpoint.load(path)


def test_the_newest_is_loaded_and_old_ones_go(tmp_path):
    assert load_newest(tmp_path) is None
    for step in (5, 100, 20, 1000):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.ones(3)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100.pt", "step-00001000.pt"]
    assert load_newest(tmp_path)["step"] == 1000


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b"\0\0\x80\x3f", b"\0\0\x80\x40"),  # a bit of a weight
        lambda data: data[:-1],
        lambda data: data + b"x",
    ],
)
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, caplog, spoil):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=2)
    path = checkpoint.save(tmp_path, 2, {"step": 2, "x": torch.ones(3)}, keep=2)
    spoilt = spoil(path.read_bytes())
    assert spoilt != path.read_bytes()
    path.write_bytes(spoilt)
    assert load_newest(tmp_path)["step"] == 1
    assert str(path) in caplog.text
    checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert load_newest(tmp_path)["step"] == 2


def test_a_newest_that_the_disk_does_not_give_is_passed_over(tmp_path, caplog, monkeypatch):
    paths = [checkpoint.save(tmp_path, step, {"step": step}, keep=2) for step in (1, 2)]

    def refuse(path):
        if path == paths[1]:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_refuse_damaged", refuse)
    assert checkpoint.newest_sound(tmp_path) == paths[0]
    assert "step-00000002.pt cannot be read (Input/output error); trying the one before it" in caplog.text
    assert paths[1].exists()  # it may be the network's fault
    monkeypatch.setattr(checkpoint, "_refuse_damaged", lambda path: refuse(paths[1]))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest_sound(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoint.save(tmp_path, 1, {"step": Evil()}, keep=1)
    with pytest.raises(UserError, match="cannot be read"):
        load_newest(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(small_disk):
    disk = small_disk("1m")
    checkpoint.save(disk, 1, {"x": torch.zeros(1000)}, keep=2)
    with pytest.raises(UserError, match="no space left on the disk while writing checkpoint"):
        checkpoint.save(disk, 2, {"x": torch.zeros(1_000_000)}, keep=2)
    assert [path.name for path in disk.iterdir()] == ["step-00000001.pt"]
    assert load_newest(disk)["x"].shape == (1000,)


def test_a_writer_saves_what_was_there_when_it_was_asked(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    save = checkpoint.save

    def slowly(*arguments):
        begun.set()
        assert go_on.wait(20)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slowly)
    writer = checkpoint.Writer(tmp_path, keep=2)
    state = {"step": 1, "x": torch.zeros(3), "parts": [torch.zeros(1)], "pair": (torch.zeros(1), "two")}
    writer.save(1, state)
    assert begun.wait(20) and checkpoint.newest(tmp_path) is None  # it has returned, and nothing is written yet
    state["x"] += 1
    state["parts"][0] += 1
    go_on.set()
    writer.finish()
    found = load_newest(tmp_path)
    assert found == {"step": 1, "x": found["x"], "parts": found["parts"], "pair": found["pair"]}
    assert not found["x"].any() and not found["parts"][0].any() and found["pair"][1] == "two"
    writer.close()


def test_a_writer_tells_of_a_full_disk_with_its_next_call(small_disk):
    writer = checkpoint.Writer(small_disk("1m"), keep=2)
    writer.save(1, {"x": torch.zeros(1_000_000)})
    with pytest.raises(UserError, match="no space left on the disk while writing checkpoint"):
        writer.save(2, {"x": torch.zeros(1)})
    writer.close()


def test_a_look_at_the_writer_tells_of_a_full_disk_without_waiting(small_disk, monkeypatch):
    folder, go, save = small_disk("300k"), threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (go.wait(20), save(*arguments)))
    writer = checkpoint.Writer(folder, 2)
    try:
        writer.save(1, {"x": torch.ones(100_000)})
        writer.check()
        go.set()
        with pytest.raises(UserError, match="no space left"):
            for _ in range(200):
                writer.check()
                time.sleep(0.05)
        writer.check()
    finally:
        writer.close()


def test_a_step_saved_again_in_vain_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("genkd.files.sync", full)
    with pytest.raises(UserError, match="no space left"):
        checkpoint.save(tmp_path, 1, {"step": 2}, keep=1)
    assert load_newest(tmp_path)["step"] == 1


def test_a_checkpoint_by_name_or_a_sentence(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    assert checkpoint.load(path) == {"step": 1}
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "step-00000002.pt")
