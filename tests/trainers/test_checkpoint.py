import pytest
import torch

from genkd.errors import UserError
from genkd.trainers import checkpoint


def test_the_newest_is_loaded_and_old_ones_go(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    for step in (5, 100, 20, 1000):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.ones(3)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100.pt", "step-00001000.pt"]
    assert checkpoint.load_newest(tmp_path)["step"] == 1000


@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\0" * len(data)]
)
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, caplog, spoil):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=2)
    path = checkpoint.save(tmp_path, 2, {"step": 2}, keep=2)
    path.write_bytes(spoil(path.read_bytes()))
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    assert str(path) in caplog.text
    checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert checkpoint.load_newest(tmp_path)["step"] == 2


def test_code_in_a_checkpoint_is_not_run(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"step": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(small_disk):
    disk = small_disk("1m")
    checkpoint.save(disk, 1, {"x": torch.zeros(1000)}, keep=2)
    with pytest.raises(UserError, match="no space left on the disk while writing checkpoint"):
        checkpoint.save(disk, 2, {"x": torch.zeros(1_000_000)}, keep=2)
    assert [path.name for path in disk.iterdir()] == ["step-00000001.pt"]
    assert checkpoint.load_newest(disk)["x"].shape == (1000,)
