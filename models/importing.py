"""Foreign weights files turned into folders that genkd trains from, evaluates and distils with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import UserError, explain_os_error
from .checkpoints import (
    CVAE_FILE,
    DETECTOR_FILE,
    NETWORK_FILES,
    RECOGNIZER_FILE,
    ModelCard,
    load_cvae,
    read_card,
    reference_card,
    save_weights,
)
from .reference import ImportReport, from_reference, identify, read_state, without_module


class Imported(NamedTuple):
    """The file that was written, its model card and number of parameters, and what became of each key."""

    path: Path
    card: ModelCard
    parameters: int
    report: ImportReport


def import_weights(
    file: Path,
    out: Path,
    *,
    classes: tuple[str, ...] = (),
    clip_length: int | None = None,
    size: int | None = None,
    compat: Literal["reference", "none"] = "reference",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    force: bool = False,
) -> Imported:
    """Writes the module that from_reference finds in a file into the folder out, as genkd's own weights.

    A network becomes recognizer.safetensors or detector.safetensors, a VAE cvae.safetensors; a pair may come into one
    folder in either order, and the VAE's card is then the network's. The settings are reference_card's. Raises
    UserError for a file that is neither, settings that do not fit it, a pair that does not fit together, and, without
    force, for a file that is there already.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to import into")
    if (out / "config.yaml").exists() or (out / "weights").exists():
        raise UserError(f"{out} is the folder of a training run; import into another one")
    state = without_module(read_state(file))
    try:
        layout = identify(state)
        path = out / (CVAE_FILE if layout.cvae else DETECTOR_FILE if layout.detection else RECOGNIZER_FILE)
        other = next((out / name for name in NETWORK_FILES if not layout.cvae and name != path.name
                      and (out / name).exists()), None)  # fmt: skip
        if other is not None:
            raise UserError(f"{other} is there already, another kind of network; import into another folder")
        if path.exists() and not force:
            raise UserError(f"{path} exists; import into another folder, or write over it with --force")
        if layout.cvae and (classes or mean or std):
            raise UserError("a CVAE has neither classes nor clips of its own; leave --classes, --mean and --std out")
        card = reference_card(
            layout, classes=classes, clip_length=clip_length, size=size, compat=compat, mean=mean, std=std
        )  # fmt: skip
        module, report = from_reference(state)
    except UserError as error:
        raise error if str(file) in str(error) or str(out) in str(error) else UserError(f"{file}: {error}") from None
    modules = {path.stem: module}
    try:
        if layout.cvae:
            card = _partner(out, card) or card
        elif (out / CVAE_FILE).exists():
            save_weights(out, card, {"cvae": load_cvae(out, card)})
        save_weights(out, card, modules)
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {path}")) from None
    return Imported(path, card, sum(parameter.numel() for parameter in module.parameters()), report)


def _partner(out: Path, vae: ModelCard) -> ModelCard | None:
    """The card of the network that the folder holds already."""
    own_file = next((out / name for name in NETWORK_FILES if (out / name).exists()), None)
    if own_file is None:
        return None
    card = read_card(out)
    if card.task != vae.task:
        raise UserError(f"{own_file} is for {card.task}, the CVAE for {vae.task}; use another folder")
    if (theirs := card.feature_shape[2:]) != (own := vae.feature_shape[2:]):
        raise UserError(
            f"{own_file} makes {theirs[0]} x {theirs[1]} features, the CVAE wants {own[0]} x {own[1]}; "
            "use another folder"
        )
    return card
