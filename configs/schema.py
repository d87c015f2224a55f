"""The configuration of a training run: frozen, typed models. Every key has its default and its unit here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PHASES = ("teacher", "representation", "distill")

# YAML has lists only; the models are hashable, so sequences become tuples.
_Floats = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
_Positive = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_NonNegative = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(_Frozen):
    """What a clip is and how it is fed."""

    dataset: str = Field("", description="shard data set folder")
    train_split: str = "train"
    eval_split: str = "test"
    clip_length: _Positive = Field(64, description="frames a clip")
    stride: _Positive = Field(1, description="source frames from one clip frame to the next")
    size: _Positive = Field(224, description="pixels, height and width of the clip")
    scales: _Floats = Field((1.0, 0.875, 0.75, 0.66), description="crop sides as shares of the short side")
    max_distort: Annotated[int, Field(ge=0)] = Field(1, description="steps in `scales` between crop width and height")
    crop_positions: Literal["random", "corners"] = Field("random", description="or the four corners and the centre")
    flip: _Fraction = Field(0.5, description="probability of a horizontal flip")
    mean: _Floats = Field((0.485, 0.456, 0.406), description="of RGB in 0..1; ImageNet's by default")
    std: _Floats = Field((0.229, 0.224, 0.225), description="of RGB in 0..1; ImageNet's by default")
    eval_clips: _Positive = Field(1, description="uniform clips a video in the evaluations during training")
    decoder: Literal["auto", "dali", "pyav"] = Field("auto", description="auto: DALI where it can, else PyAV")
    decoder_threads: Annotated[int, Field(ge=0)] = Field(0, description="threads; 0: one a core, at most 8 a rank")
    prefetch: _Positive = Field(2, description="batches in flight ahead of the consumer")
    on_error: Literal["fail", "replace"] = Field("fail", description="a corrupt payload: stop, or use a neighbour")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std need three values each, and std none that is 0 or less")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError("scales must be one or more values in (0, 1]")
        return self


class ModelConfig(_Frozen):
    """I3D recognizer. The number of classes comes from the data set, feature sizes from the clip."""

    temporal: Literal["full", "top_heavy"] = Field("full", description="top_heavy: 1xkxk kernels up to Mixed_4c")
    width: Annotated[float, Field(gt=0, le=4)] = Field(1.0, description="factor on all channels, steps of 1/32")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="PyTorch's meaning; 0.01 as published")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.width * 32) % 1:
            raise ValueError(
                f"width {self.width} is no multiple of 1/32, so group norm's 32 groups would not divide it"
            )
        return self


class LossConfig(_Frozen):
    """Weights of the loss terms; the formulas are in trainers/losses.py."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    kl: _NonNegative = 0.1
    generative: _NonNegative = Field(0.01, description="student against teacher reconstruction, stage A")
    reconstruction: _NonNegative = Field(0.5, description="stage B, reached after `reconstruction_ramp` epochs")
    reconstruction_ramp: _Positive = 20
    attention: _NonNegative = Field(0.1, description="student against teacher attention, stage B")


class OptimizerConfig(_Frozen):
    """One optimizer and its schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    backend: Literal["torch", "apex"] = Field("torch", description="apex: NVIDIA's FusedSGD and FusedAdam")
    lr: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    weight_decay: _NonNegative = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: _NonNegative = 0.0


class TrainConfig(_Frozen):
    """Everything that decides a training run."""

    phase: Literal["teacher", "representation", "distill"]
    method: Literal["generative", "none"] = Field("generative", description="distill only; none: the plain student")
    compat: Literal["none", "reference"] = Field("none", description="reference: the original code's sums and scores")
    teacher: str = Field("", description="distill: the representation run, or a folder with its weights")
    init: str = Field("", description="run or weights to start from; representation starts from the teacher run")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: _Positive = 50
    batch_size: _Positive = Field(16, description="clips a step over all ranks")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a capable GPU, else fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grad_clip: _NonNegative = Field(0.0, description="largest gradient norm; 0: no limit")
    log_every: _Positive = Field(10, description="steps")
    checkpoint_every: _Positive = Field(500, description="steps; one is written at every epoch's end too")
    keep_checkpoints: _Positive = 2
    eval_every: Annotated[int, Field(ge=0)] = Field(1, description="epochs; 0: never")
    tensorboard: bool = True
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cvae_optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=1e-4)
