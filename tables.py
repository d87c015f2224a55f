"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(tables: Iterable[Table]) -> None:
    """Prints tables to standard output, as wide as they need where that is no terminal."""
    # Names of classes, videos and folders may look like rich's markup, such as [b], or its emoji, such as :star:.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=140)
    for table in tables:
        console.print(table)


def inspection_tables(found: dict[str, Any]) -> list[Table]:
    """The splits, the classes and the spread of sizes of a data set."""
    video = found["video"]
    splits = _table(
        f"{found['name']}: {found['modality']}, {video['codec']}, {found['shards']} shards",
        "split",
        "videos",
        "frames",
        "duration",
        "size",
    )
    for name, entry in found["splits"].items():
        splits.add_row(
            name, f"{entry['videos']:,}", f"{entry['frames']:,}", _duration(entry["seconds"]), _bytes(entry["bytes"])
        )
    names = list(found["splits"])
    # Untrimmed videos have no class of their own: their actions are counted instead.
    counted = found["actions"] or found["classes"]
    classes = _table("actions" if found["actions"] else "classes", "label", "class", *names)
    for label, (name, counts) in enumerate(counted.items()):
        classes.add_row(str(label), name, *(str(counts[split]) for split in names))
    spread = _table("videos", "", "min", "median", "max")
    labels = {"duration_s": "seconds", "fps": "frames/s", "width": "width px", "height": "height px",
              "gop_frames": "frames a GOP", "bytes_per_video": "bytes"}  # fmt: skip
    for key, title in labels.items():
        spread.add_row(title, *(f"{found[key][part]:,g}" for part in ("min", "median", "max")))
    tables = [splits, classes, spread]
    if found["rejected"]:
        rejected = _table("rejected sources (errors.parquet)", "stage", "sources")
        for stage, count in found["rejected"].items():
            rejected.add_row(stage, str(count))
        tables.append(rejected)
    return tables


def estimate_tables(found: dict[str, Any]) -> list[Table]:
    """A dry run's plan, and what it expects."""
    plan = _table("plan", "what", "found")
    plan.add_row("sources", f"{found['videos']:,} videos, {_bytes(found['source_bytes'])}, {found['classes']} classes")
    plan.add_row("splits", ", ".join(f"{name} {count:,}" for name, count in found["splits"].items()))
    done = f", {found['finished_shards']:,} of them finished" if found["finished_shards"] else ""
    plan.add_row("shards", f"{found['shards']:,}{done}")
    for reason, count in list(found["rejected"].items())[:8]:
        plan.add_row("left out", f"{count:,}: {reason}")
    sample, expected = found["sample"], found["estimate"]
    failed = f", {sample['failed']} of them cannot be converted" if sample["failed"] else ""
    part = f" and {100 * sample['part']:.2g} % of another one" if sample["part"] else ""
    plan.add_row("sample", f"{sample['videos']} videos{part} in {sample['seconds']:.1f} s{failed}")
    if sample["error"]:
        plan.add_row("first error", sample["error"])
    if expected:
        what = "still to write" if found["finished_shards"] else "data set"
        plan.add_row(what, f"about {_bytes(expected['bytes'])}")
        plan.add_row("time", f"about {_duration(expected['seconds'])} with {expected['workers']} workers")
    else:
        plan.add_row("data set", "none of the sample could be converted")
    return [plan]


def recognition_tables(values: dict[str, Any]) -> list[Table]:
    """Accuracies, and the confusion matrix where it is small enough to read."""
    head = f"{values['split']}: {values['videos']} videos, {values['clips']} clips x {values['crops']} crops"
    metrics = _table(head, *_METRICS.values(), "clips/s")
    metrics.add_row(*_metrics(values), f"{values['clips_per_s']:.1f}")
    if len(values["classes"]) > 20:
        return [metrics]
    confusion = _table("confusion: rows are true classes", "", *values["classes"], "top-1")
    for name, row in zip(values["classes"], values["confusion"], strict=True):
        share = values["per_class"][name]["top1"]
        confusion.add_row(name, *(str(count or "·") for count in row), "-" if share is None else f"{100 * share:.0f} %")
    return [metrics, confusion]


def split_tables(values: dict[str, Any]) -> list[Table]:
    """A row a split, their mean and standard deviation."""
    splits = values["splits"]
    first = splits[0]
    head = f"{first['split']}: {len(splits)} evaluations, {first['clips']} clips x {first['crops']} crops"
    table = _table(head, "", "weights", "videos", *_METRICS.values())
    for number, entry in enumerate(splits, 1):
        table.add_row(str(number), entry["weights"], f"{entry['videos']:,}", *_metrics(entry))
    table.add_section()
    table.add_row("mean", "", "", *_metrics(values["mean"]))
    table.add_row("std", "", "", *_metrics(values["std"]))
    return [table]


def fusion_tables(values: dict[str, Any]) -> list[Table]:
    """A row a stream and one for the fusion, what it gains, and the search, if any; means where there are splits."""
    several = "splits" in values
    what = f"mean ± std of {len(values['splits'])} splits" if several else f"{values['videos']:,} videos"
    table = _table(f"fusion by {values['rule']}: {what}", "stream", "weight", *_METRICS.values())
    for stream in values["streams"]:
        shown = _spread(stream["mean"], stream["std"]) if several else _metrics(stream)
        table.add_row(stream["name"], f"{stream['weight']:g}", *shown)
    table.add_section()
    table.add_row("fusion", "", *(_spread(values["mean"], values["std"]) if several else _metrics(values)))
    gain, error = (
        (values["difference"]["mean"], values["difference"]["std"])
        if several
        else (values["difference"], values["standard_error"])
    )
    gains = _table("gain in top-1", "over", "points", "std" if several else "paired standard error")
    gains.add_row(values["best_single"], f"{100 * gain:+.2f}", "-" if error is None else f"{100 * error:.2f}")
    if "search" not in values:
        return [table, gains]
    found = values["search"]
    search = _table("search", f"weight of {values['streams'][1]['name']}", "top-1", "notes")
    for weight, top1 in zip(found["weights"], found["top1"], strict=True):
        search.add_row(f"{weight:g}", f"{100 * top1:.2f} %", found["note"] if weight == found["best_weight"] else "")
    return [table, gains, search]


def detection_tables(values: dict[str, Any], *, per_class: bool = False) -> list[Table]:
    """mAP by tIoU, what was left out, and where they are there: classes, average recall, errors."""
    counts = values["counts"]
    levels = [f"{tiou:g}" for tiou in values["tious"]]
    head = f"{values['subset']}: {counts['used']:,} predictions, {len(values['per_class'])} classes"
    table = _table(f"{head}, in % by tIoU", "", *levels, "average")
    table.add_row("mAP", *map(_share, values["map"]), _share(values["average_map"]))
    if "average_recall" in values:
        table.add_section()
        found = values["average_recall"]
        for column, (number, average) in enumerate(zip(found["numbers"], found["average"], strict=True)):
            table.add_row(f"AR@{number}", *(_share(row[column]) for row in found["recall"]), _share(average))
    tables = [table]
    if per_class:
        classes = _table("average precision in % by tIoU", "class", "instances", "predictions", *levels, "average")
        for name, entry in values["per_class"].items():
            mean = sum(entry["ap"]) / len(entry["ap"])
            classes.add_row(
                name, f"{entry['instances']:,}", f"{entry['predictions']:,}", *map(_share, entry["ap"]), _share(mean)
            )
        tables.append(classes)
    if "errors" in values:
        found = values["errors"]
        # Past the last predictions there is nothing to show.
        filled = [row for row in found["shares"] if row[found["types"][0]] is not None]
        ranks = [f"{number}G" for number in range(1, len(filled) + 1)]
        errors = _table(
            "predictions by rank in % of them, G: the instances of a class", "", *ranks, "all", "mAP_N gain"
        )
        for kind in found["types"]:
            gain = f"{100 * found['gain'][kind]:+.2f}" if kind != found["types"][0] else ""
            errors.add_row(kind, *(_share(row[kind]) for row in filled), _share(found["overall"][kind]), gain)
        tables.append(errors)
    notes = {
        "unknown_video": f"ignored: of videos that are not in subset {values['subset']!r}",
        "unknown_label": "ignored: of labels that no instance has",
        "reversed": "false: end before they start",
        "reversed_instances": "instances that end before they start, which nothing finds",
    }
    missing = [name for name, entry in values["per_class"].items() if not entry["predictions"]]
    if missing or any(counts[key] for key in notes):
        left = _table("to note", "what", "found")
        for key, text in notes.items():
            if counts[key]:
                left.add_row(text, f"{counts[key]:,}")
        if missing:
            left.add_row(f"classes without a prediction, AP 0: {', '.join(missing)}", f"{len(missing):,}")
        tables.append(left)
    return tables


def benchmark_tables(result: dict[str, Any]) -> list[Table]:
    """One row a contender: median, spread and ratio to the first; one table a workload where there are several."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row.get("workload", ""), row.get("unit", result["unit"])), []).append(row)
    tables = []
    for (workload, unit), rows in groups.items():
        title = f"{result['benchmark']} {workload}".strip() + f" on {result['machine']['cpu']}"
        table = _table(title, "contender", unit, "p10", "p90", "ratio", "notes")
        for row in rows:
            table.add_row(
                row["name"], f"{row['median']:.2f}", f"{row['p10']:.2f}", f"{row['p90']:.2f}", f"{row['ratio']:.2f}",
                ", ".join(_note(key, value) for key, value in row.get("extra", {}).items() if value is not None),
            )  # fmt: skip
        tables.append(table)
    if result.get("targets"):
        targets = _table("targets", "what", "measured", "goal", "met")
        for entry in result["targets"]:
            bounds = (("at_least", "at least"), ("at_most", "at most"))
            goal = ", ".join(f"{word} {entry[key]:g}" for key, word in bounds if entry[key] is not None)
            met = {True: "yes", False: "no"}.get(entry["met"], "")
            targets.add_row(entry["name"], f"{entry['measured']:.3g}", goal, met)
        tables.append(targets)
    if result["about"].get("skipped"):
        skipped = _table("left out", "what", "found")
        for name, reason in result["about"]["skipped"].items():
            skipped.add_row(name, reason)
        tables.append(skipped)
    return tables


def scaling_tables(result: dict[str, Any]) -> list[Table]:
    """The assumptions, the prediction by GPUs, and how far off the model is for one and two ranks here."""
    found = result["prediction"]
    assumed = _table(
        f"assumptions for {found['case']}, {found['preset']}; change with --assume", "name", "value", "unit", "source"
    )
    for entry in found["assumptions"]:
        assumed.add_row(entry["name"], f"{entry['value']:.4g}", entry["unit"], entry["source"])
    predicted = _table(
        "predicted, not measured on several GPUs", "GPUs", "clips/s", "efficiency", "limit", "step ms", "not hidden ms",
        "without limits", "bf16 gradients", "loaders", "storage",
    )  # fmt: skip
    for row, half in zip(found["rows"], found["rows_bf16"], strict=True):
        rates = row["without_limits"], half["without_limits"], row["loader"], row["storage"]
        predicted.add_row(
            str(row["gpus"]), f"{row['clips_per_s']:,.0f}", f"{100 * row['efficiency']:.1f} %", row["limit"],
            f"{1000 * row['step_s']:.1f}", f"{1000 * row['exposed_s']:.1f}",
            *(f"{value:,.0f}" for value in rates),
        )  # fmt: skip
    tables = [assumed, predicted]
    for entry in result["validation"]:
        speedup = entry["speedup"]
        title = f"{entry['case']}, {entry['clock']} s a step: 2 ranks beside 1 {speedup['predicted']:.2f} predicted"
        checked = _table(f"{title}, {speedup['measured']:.2f} measured", "", "predicted", "measured", "error")
        for row in entry["rows"]:
            values = (f"{row['predicted_s']:.3f}", f"{row['measured_s']:.3f}", f"{row['error_percent']:+.1f} %")
            checked.add_row(row["name"], *values)
        tables.append(checked)
    return tables


def _note(key: str, value: Any) -> str:
    if value is True:
        return key
    if isinstance(value, dict):  # shares of a whole
        return f"{key}: " + " ".join(f"{name} {100 * share:.0f} %" for name, share in value.items())
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def doctor_tables(findings: list[dict[str, Any]]) -> list[Table]:
    """One row a finding."""
    table = _table("this machine", "", "what", "found")
    for entry in findings:
        state = Text("ok", style="green") if entry["ok"] else Text("no", style="red")
        table.add_row(state, entry["what"], entry["found"])
    return [table]


def export_tables(values: dict[str, Any]) -> list[Table]:
    """The files of an export, and how far each format is from the network."""
    millions, giga = values["parameters"]["total"] / 1e6, values["flops"]["total"] / 1e9
    files = _table(f"{values['name']}: {millions:.2f} M parameters, {giga:.2f} GFLOPs a clip", "file", "format", "size")
    for entry in values["files"]:
        files.add_row(entry["file"], entry["format"] or "", _bytes(entry["bytes"]))
    outputs = list(values["outputs"])
    check = _table(f"largest relative difference from the network on {values['check']['clips']}", "format", *outputs)
    for name, found in values["check"]["differences"].items():
        check.add_row(name, *(f"{found[output]['relative']:.1e}" for output in outputs))
    return [files, check]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(
            column,
            justify="left"
            if number == 0 or column in ("class", "what", "found", "notes", "weights", "source")
            else "right",
        )
    return table


_METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class", "ece": "ECE", "loss": "NLL"}


def _metrics(values: dict[str, Any]) -> list[str]:
    return [f"{values[key]:.4f}" if key == "loss" else f"{100 * values[key]:.2f} %" for key in _METRICS]


def _spread(mean: dict[str, float], std: dict[str, float]) -> list[str]:
    return [
        f"{mean[key]:.4f} ± {std[key]:.4f}" if key == "loss" else f"{100 * mean[key]:.2f} ± {100 * std[key]:.2f} %"
        for key in _METRICS
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
