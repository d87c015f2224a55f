"""Who may begin or change the plan of a conversion: slices at once, changed scans, folders of other things."""

import dataclasses
import json
import os
import threading
import time

import pyarrow.parquet as pq
import pytest

from genkd import remote_storage
from genkd.errors import UserError
from genkd.preprocessing import sources
from genkd.preprocessing.convert import convert, merge
from genkd.preprocessing.export import export_parquet
from genkd.preprocessing.plan import adopt
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.video import VideoSettings
from genkd.remote_storage import RemoteStorage
from genkd.storage import LocalStorage, storage_at

SETTINGS = VideoSettings("mjpeg", short_side=48)


@pytest.fixture
def root(videos, tmp_path):
    """Four short videos of two classes that a test may change."""
    for name in ("Bob", "Orbit"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for path in sorted((videos / "UCF-101" / name).iterdir())[:2]:
            (tmp_path / "root" / name / path.name).write_bytes(path.read_bytes())
    return tmp_path / "root"


def test_a_slice_whose_neighbour_writes_the_plan_meanwhile_takes_it(root, tmp_path, monkeypatch):
    """Between the listing and the question for plan.json, and the other way round, another slice begins the folder."""
    source = sources.folder(root)
    for number, method in enumerate(("names", "exists")):
        storage, real = storage_at(tmp_path / f"out{number}"), getattr(LocalStorage, method)
        others = []

        def interrupted(self, *arguments, storage=storage, real=real, others=others, **more):
            found = real(self, *arguments, **more)
            if not others:
                others.append(threading.Thread(target=adopt, args=(storage_at(storage.name), source, SETTINGS),
                                               kwargs={"refresh": False, "alone": False}))  # fmt: skip
                others[0].start()
                others[0].join(timeout=10)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, method, interrupted)
            plan = adopt(storage, source, SETTINGS, refresh=False, alone=False)
        assert not others[0].is_alive() and plan.info == json.loads(storage.read("plan.json"))


def test_slices_that_refresh_at_once_delete_nothing_that_another_has_finished(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(sources.folder(root), out, SETTINGS, workers=0)
    for path in root.glob("*/*.avi"):
        os.utime(path, ns=(5, 5))
    other = threading.Thread(
        target=convert, args=(sources.folder(root), out, SETTINGS),
        kwargs={"workers": 0, "part": (2, 2), "refresh": True},
    )  # fmt: skip
    delete = LocalStorage.delete

    def slow(self, name):
        if threading.current_thread() is not other:
            if other.ident is None:
                other.start()
            time.sleep(0.1)  # the other one's whole work, if nothing holds it back
        delete(self, name)

    monkeypatch.setattr(LocalStorage, "delete", slow)
    convert(sources.folder(root), out, SETTINGS, workers=0, part=(1, 2), refresh=True)
    other.join(timeout=30)
    monkeypatch.undo()
    merge(out)
    assert Dataset.open(out).table.num_rows == 4


def test_a_turn_is_given_to_one_run_at_a_time_elsewhere_too(monkeypatch):
    monkeypatch.setattr(remote_storage, "_SETTLE_SECONDS", 0.01)
    first, second = RemoteStorage("memory://turns"), RemoteStorage("memory://turns")
    with first.turn() as mine, second.turn() as other:
        assert mine and not other
    with second.turn() as other:
        assert other
    assert second.names() == []


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=0)
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        convert(sources.folder(root), tmp_path / "mine", SETTINGS, workers=0)
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        export_parquet(tmp_path / "data", tmp_path / "mine", workers=0)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    (tmp_path / "data" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"lost its plan\.json"):
        convert(sources.folder(root), tmp_path / "data", SETTINGS, workers=0)


def test_what_a_later_scan_rejects_is_merged_too(root, tmp_path):
    out = tmp_path / "out"
    convert(sources.folder(root), out, SETTINGS, workers=0)
    (root / "Bob" / "notes.txt").touch()
    convert(sources.folder(root), out, SETTINGS, workers=0)
    merge(out)
    assert pq.read_table(out / "errors.parquet")["path"].to_pylist() == ["Bob/notes.txt"]


def test_another_set_of_classes_needs_another_folder(root, tmp_path):
    source = sources.folder(root)
    convert(source, tmp_path / "out", SETTINGS, workers=0)
    more = dataclasses.replace(source, classes=("Able", *source.classes))
    with pytest.raises(UserError, match=r"'Able' is new.*renumbers the labels of all videos; convert into a new"):
        convert(more, tmp_path / "out", SETTINGS, workers=0, refresh=True)


@pytest.mark.parametrize("missing", ["video", "shards", "classes"])
def test_a_damaged_plan_is_one_sentence(root, tmp_path, missing):
    convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    del plan[missing]
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    for run in (merge, lambda out: convert(sources.folder(root), out, SETTINGS, workers=0)):
        with pytest.raises(UserError, match=r"plan\.json is damaged in .*/out; restore it"):
            run(tmp_path / "out")
