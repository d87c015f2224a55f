import gzip
import json
import re
import socket
import sys
import time
import types
import urllib.error
import urllib.request

import pytest

from genkd.configs.load import load
from genkd.errors import UserError
from genkd.trainers import metrics, observers, prometheus
from genkd.trainers.loop import train
from genkd.trainers.spread import Row

SAMPLE = re.compile(
    r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\} (NaN|[+-]Inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)'
)
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\[\\n"])*)"')
ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


def quiet(text):
    pass


def parsed(text):
    """{(name, labels as sorted pairs): value} of the text format; fails at all that it does not allow.

    Each metric's lines stand together behind its HELP and TYPE, each sample is there once, the last line ends.
    """
    assert text.endswith("\n")
    samples, seen, current, told = {}, set(), None, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            told = line.split(" ", 3)[2]
            assert told not in seen and line.split(" ", 3)[3]
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current == told and kind == "gauge"
            seen.add(current)
        else:
            found = SAMPLE.fullmatch(line)
            assert found and found[1] == current, line
            labels = [(name, re.sub(r'\\[\\n"]', lambda part: ESCAPES[part[0]], value))
                      for name, value in LABEL.findall(found[2])]  # fmt: skip
            key = (current, tuple(sorted(labels)))
            assert len(dict(labels)) == len(labels) and key not in samples
            samples[key] = float(found[3])
    try:  # another reader of the format, where there is one
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return samples
    others = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert {key: repr(value) for key, value in others.items()} == {k: repr(v) for k, v in samples.items()}
    return samples


def of(samples, name, **labels):
    """The values of a metric whose samples have these labels."""
    return [value for (metric, own), value in samples.items() if metric == name and labels.items() <= dict(own).items()]


ODD = 'a "quoted"\\run\nof two lines'


def test_the_text_is_prometheus_format_whatever_a_run_is_called(tmp_path):
    rows = [
        Row(0, "node-a", 0.5, 0.1, 0.02, 3 * 10**9, 4 * 10**9),
        Row(1, 'no"de', 0.5, 0.4, 0.3, 3 * 10**9, 5 * 10**9),
    ]
    exporter = prometheus.Exporter(str(tmp_path / "x.prom"), ODD, 100, lambda: rows)
    exporter.begin(3)
    assert of(parsed((tmp_path / "x.prom").read_text()), "genkd_step", run=ODD) == [3]
    exporter.write("train", 7, {"epoch": 2, "lr": 1e-4, "recognizer/total": float("nan"), "clips_per_s": 12.5,
                                "read_mb_per_s": 2.0, "straggler": {"rank": 1}})  # fmt: skip
    exporter.write("eval", 7, {"epoch": 2, "top1": 0.25, "loss": float("inf")})
    samples = parsed((tmp_path / "x.prom").read_text())
    assert all(dict(labels)["run"] == ODD for _, labels in samples)
    for name, value in (("step", 7), ("steps", 100), ("epoch", 2), ("learning_rate", 1e-4), ("running", 1),
                        ("clips_per_second", 12.5), ("read_bytes_per_second", 2e6)):  # fmt: skip
        assert of(samples, f"genkd_{name}") == [value], name
    assert str(of(samples, "genkd_loss", term="recognizer/total")) == "[nan]"
    assert of(samples, "genkd_evaluation", metric="top1") == [0.25]
    assert of(samples, "genkd_evaluation", metric="loss") == [float("inf")]
    assert of(samples, "genkd_rank_own_seconds", rank="1", host='no"de') == [0.4]
    assert of(samples, "genkd_rank_straggler", rank="0") == [0] and of(samples, "genkd_rank_straggler", rank="1") == [1]
    assert of(samples, "genkd_rank_gpu_memory_bytes", rank="1", kind="reserved") == [5e9]
    exporter.close(finished=True)
    samples = parsed((tmp_path / "x.prom").read_text())
    assert of(samples, "genkd_running") == [0] and of(samples, "genkd_step") == [7]
    assert not of(samples, "genkd_clips_per_second") and not of(samples, "genkd_rank_step_seconds")
    assert [path.name for path in tmp_path.iterdir()] == ["x.prom"]


def test_a_metrics_file_that_can_not_be_written_is_told_once_and_ends_no_run(small_disk, caplog):
    disk = small_disk("64k")
    exporter = prometheus.Exporter(str(disk / "x.prom"), "run", 9)
    exporter.begin(0)
    with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    before = (disk / "x.prom").read_text()
    for step in (1, 2):
        exporter.write("train", step, {"lr": 0.1})
    assert [record.message for record in caplog.records if "no space left" in record.message] == caplog.messages
    assert len(caplog.messages) == 1 and (disk / "x.prom").read_text() == before
    (disk / "filler").unlink()
    exporter.write("train", 3, {"lr": 0.1})
    assert of(parsed((disk / "x.prom").read_text()), "genkd_step") == [3]


def get(port, path="/metrics", host="127.0.0.1"):
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_run_is_watched_over_http_and_by_a_file_while_it_trains(tiny, tmp_path, caplog):
    """The file and the server have the step of the line that has just been written."""
    caplog.set_level("INFO", logger="genkd")
    run, file = tmp_path / "run", tmp_path / "node" / "genkd.prom"
    seen = []

    def look(line):
        if line.startswith("epoch") and "ETA" in line:
            port = int(re.search(r"served at http://127\.0\.0\.1:(\d+)/metrics", caplog.text)[1])
            kind, text = get(port)
            assert kind == "text/plain; version=0.0.4; charset=utf-8"
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(port, "/")
            samples = parsed(text)
            assert of(parsed(file.read_text()), "genkd_step") == of(samples, "genkd_step")
            seen.append((port, samples))

    train(tiny("teacher", "eval_every=1", f"prometheus=[{file},'127.0.0.1:0']"), run, look)
    lines = [line for line in metrics.read(run) if line["kind"] == "train"]
    assert len(seen) == len(lines) == 6
    for line, (_, samples) in zip(lines, seen, strict=True):
        assert of(samples, "genkd_step", run=str(run)) == [line["step"]] and of(samples, "genkd_steps") == [6]
        assert of(samples, "genkd_loss", term="recognizer/class") == [line["recognizer/class"]]
        assert of(samples, "genkd_frames_per_second") == [line["frames_per_s"]]
        (step,), (wait,) = of(samples, "genkd_rank_step_seconds"), of(samples, "genkd_rank_data_wait_seconds", rank="0")
        assert 0 <= wait < step < 4 / line["clips_per_s"] + 1e-3  # the rest of the interval is what is between steps
    evaluations = [line for line in metrics.read(run) if line["kind"] == "eval"]
    assert of(seen[3][1], "genkd_evaluation", metric="top1") == [evaluations[0]["top1"]]
    ended = parsed(file.read_text())
    assert of(ended, "genkd_running") == [0] and of(ended, "genkd_evaluation", metric="top1") == [
        evaluations[1]["top1"]
    ]
    with pytest.raises(OSError):
        get(seen[0][0])
    assert "step_s_min" not in lines[0]  # there is nobody to compare with


def test_places_that_cannot_be_had_are_one_sentence(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot listen there \(Address already in use\)"):
            train(tiny("teacher", "eval_every=0", f"prometheus=127.0.0.1:{port}"), tmp_path / "run", quiet)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; name a folder"):
        train(tiny("teacher", "eval_every=0", f"prometheus={tmp_path / 'file' / 'x.prom'}"), tmp_path / "run", quiet)
    # What they leave does not stand in the way.
    assert (
        train(tiny("teacher", "eval_every=0", f"prometheus={tmp_path / 'x.prom'}"), tmp_path / "run", quiet)["steps"]
        == 6
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prometheus=metrics.txt", "HOST:PORT or :PORT, or a list of such, not 'metrics.txt'"),
        ("prometheus=9400", "not '9400'"),
        ("prometheus=[a.prom,':99999']", "not ':99999'"),
        ("profile=15:10", "profile is FIRST:LAST"),
        ("profile=10", "profile is FIRST:LAST"),
        ("profile=steps", "profile is FIRST:LAST"),
        ("profile=[1,2]", "profile is FIRST:LAST"),
        ("wandb=on", "wandb: Input should be 'off', 'offline' or 'online'"),
        ("wandb_project=''", "wandb_project"),
    ],
)
def test_bad_values_are_one_sentence(override, words):
    with pytest.raises(UserError) as caught:
        load("demo", "teacher", [override])
    assert words in str(caught.value)


def test_values_are_read_as_they_are_meant():
    config = load("demo", "teacher", ["profile=10:15", "prometheus=':9400'", "wandb=off"])
    assert (config.profile, config.prometheus, config.wandb) == ("10:15", (":9400",), "off")
    assert load("demo", "teacher", ["profile=steps=10:15"]).profile == "steps=10:15"
    assert load("demo", "teacher", ["prometheus=[a.prom, '[::1]:9400']"]).prometheus == ("a.prom", "[::1]:9400")
    assert load("demo", "teacher", ["seed=0x10", "epochs=1_0"]).seed == 16


def test_what_looks_on_may_change_when_a_run_is_continued(tiny, tmp_path):
    """Also after a stop among the profiled steps: each part of them has its trace."""
    run, changed = tmp_path / "run", ["wandb=off", f"prometheus={tmp_path / 'x.prom'}", "profile=0:3"]

    def stop(line):
        if "step 2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny("teacher", "eval_every=0", "profile=steps=1:4"), run, stop)
    assert train(tiny("teacher", "eval_every=0", *changed), run, quiet)["steps"] == 6
    names = {path.name for path in (run / "profile").iterdir()}
    assert names == {f"rank0-steps{steps}.{end}" for steps in ("1-2", "1-3") for end in ("json.gz", "txt")}


def events(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_profile_has_the_steps_asked_for_and_their_most_expensive_ops(tiny, tmp_path):
    """The last two of the first epoch: what comes after it is not in them, and no loss is another."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    wide = "model.width=0.25"  # whose convolutions cost more than what surrounds them
    train(tiny("teacher", wide), plain, quiet)
    train(tiny("teacher", wide, "profile=1:3"), watched, quiet)
    assert {path.name for path in (watched / "profile").iterdir()} == {"rank0-steps1-3.json.gz", "rank0-steps1-3.txt"}
    found = events(watched / "profile" / "rank0-steps1-3.json.gz")
    names = [event.get("name") for event in found if event.get("cat") in ("user_annotation", "cpu_op")]
    assert names.count("data") == names.count("optimizer") == 2
    assert any(event.get("name") == "[memory]" for event in found)
    table = (watched / "profile" / "rank0-steps1-3.txt").read_text()
    rows = [line.split()[0] for line in table.splitlines() if "::" in line]
    assert len(rows) == 10 and "aten::mkldnn_convolution" in rows and "optimizer" not in table
    one, other = ([line["recognizer/total"] for line in metrics.read(run) if line["kind"] == "train"]
                  for run in (plain, watched))  # fmt: skip
    assert one == other and len(one) == 6


def test_a_run_beyond_the_profiled_steps_profiles_nothing(tiny, tmp_path):
    train(tiny("teacher", "eval_every=0", "epochs=1", "profile=3:5"), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.gpu
def test_a_gpus_profile_has_its_kernels(tiny, tmp_path):
    train(tiny("teacher", "model.width=0.25", "profile=1:3", "device=cuda"), tmp_path / "run", quiet)
    found = events(tmp_path / "run" / "profile" / "rank0-steps1-3.json.gz")
    assert any(event.get("cat") == "kernel" for event in found)
    table = (tmp_path / "run" / "profile" / "rank0-steps1-3.txt").read_text()
    rows = [line for line in table.splitlines() if "::" in line]
    assert "Self CUDA" in table and len(rows) == 10 and "optimizer " not in table


class FakeWandb(types.ModuleType):
    """The part of the package that is used, with its refusals: no login, steps that go back, logs after the end."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, *, project, name, id, resume, mode, dir, config):
        if mode == "online":
            raise self.Error("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")
        assert mode == "offline" and resume is None
        self.runs.append(types.SimpleNamespace(project=project, name=name, id=id, dir=dir, config=config, rows=[],
                                               exit_code=None))  # fmt: skip
        run = self.runs[-1]

        def log(values, step):
            assert run.exit_code is None and all(step >= before for before, _ in run.rows)
            json.dumps(values)
            run.rows.append((step, values))

        run.log, run.finish = log, lambda exit_code: setattr(run, "exit_code", exit_code)
        return run


def test_a_run_in_weights_and_biases_is_the_same_when_it_is_continued(tiny, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "student-3"

    def stop(line):
        if "step 2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny("teacher", "wandb=offline", "eval_every=1"), run, stop)
    train(tiny("teacher", "wandb=offline", "eval_every=1", "wandb_project=motion", "wandb_name=again"), run, quiet)
    first, second = fake.runs
    assert first.id == second.id and (first.exit_code, second.exit_code) == (1, 0)
    assert (first.project, first.name, second.project, second.name) == ("genkd", "student-3", "motion", "again")
    assert second.config["optimizer"]["lr"] == 0.001
    line = metrics.read(run)[-1]
    assert line["kind"] == "eval" and second.rows[-1] == (
        6,
        {f"eval/{name}": value for name, value in list(line.items())[2:]},
    )
    assert [step for step, values in second.rows if "train/lr" in values] == [2, 3, 4, 5, 6]


def test_weights_and_biases_that_refuses_or_is_missing_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(UserError, match=r"wandb=online: api_key not configured.*wandb login.*wandb=offline or off"):
        train(tiny("teacher", "wandb=online"), tmp_path / "run", quiet)
    train(tiny("teacher", "wandb=offline"), tmp_path / "run", quiet)  # what it left does not stand in the way
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'genkd\[wandb\]'"):
        train(tiny("teacher", "wandb=offline"), tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # as the package leaves where it ran
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="its package is not installed"):
        observers.require(tiny("teacher", "wandb=offline"))


def test_the_real_package_keeps_a_run_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    train(tiny("teacher", "wandb=offline", "eval_every=0"), run, quiet)
    identity = json.loads((run / "wandb" / "genkd.json").read_text())["id"]
    (kept,) = (run / "wandb").glob(f"offline-run-*-{identity}")
    deadline = time.monotonic() + 60  # W&B's own process writes the file, and may do so after finish() returns
    while (recorded := (kept / f"run-{identity}.wandb").read_bytes()).count(b"train/lr") < 6:
        assert time.monotonic() < deadline, f"{len(recorded)} bytes"
        time.sleep(0.1)
    assert b"train/recognizer/total" in recorded and b"optimizer" in recorded
