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

    dataset: str = Field("", description="shard data set: a folder or an fsspec URL")
    train_split: str = "train"
    eval_split: str = "test"
    clip_length: _Positive = Field(64, description="frames a clip")
    stride: _Positive = Field(1, description="source frames from one clip frame to the next")
    frame_jitter: Annotated[int, Field(ge=0)] = Field(
        0, description="source frames that each clip frame is moved forward by at most, in training; below stride"
    )
    padding: Literal["loop", "black", "zero", "fail"] = Field(
        "loop",
        description="a video shorter than the clip: played in a loop, filled up with black frames (flow: no motion) or "
        "with zeros after normalization, or refused",
    )
    size: _Positive = Field(224, description="pixels, height and width of the clip")
    scales: _Floats = Field((1.0, 0.875, 0.75, 0.66), description="crop sides as shares of the short side")
    max_distort: Annotated[int, Field(ge=0)] = Field(1, description="steps in `scales` between crop width and height")
    crop_positions: Literal["random", "corners"] = Field("random", description="or the four corners and the centre")
    eval_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="side of evaluation crops as a share of the short side"
    )
    flip: _Fraction = Field(0.5, description="probability of a horizontal flip")
    brightness: _Fraction = Field(0.0, description="colour jitter: factor from 1 - b to 1 + b")
    contrast: _Fraction = Field(0.0, description="colour jitter: factor from 1 - c to 1 + c, about mid grey")
    saturation: _Fraction = Field(0.0, description="colour jitter: factor from 1 - s to 1 + s")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="colour jitter: turns of the colour wheel, +-")
    mean: _Floats = Field((0.485, 0.456, 0.406), description="of RGB in 0..1; ImageNet's by default")
    std: _Floats = Field((0.229, 0.224, 0.225), description="of RGB in 0..1; ImageNet's by default")
    flow_mean: _Floats = Field((0.5, 0.5), description="of flow's x and y in 0..1; 0.5 is no motion")
    flow_std: _Floats = Field((0.226, 0.226), description="of flow's x and y in 0..1")
    dtype: Literal["float32", "float16", "uint8"] = Field(
        "float32", description="of clips; uint8 are pixels, neither normalized nor padded by zero"
    )
    eval_clips: _Positive = Field(1, description="uniform clips a video in the evaluations during training")
    window_stride: _Positive = Field(30, description="frames from one training window to the next, for detection")
    eval_window_stride: _Positive = Field(128, description="frames from one test window to the next, for detection")
    shuffle_shards: Annotated[int, Field(ge=0)] = Field(
        0, description="K: shuffle the shards, then videos within each K of them, for remote storage; 0: all videos"
    )
    decoder: Literal["auto", "dali", "pyav", "hybrid"] = Field(
        "auto", description="auto: DALI (NVDEC) on a GPU where it can, else PyAV; hybrid: both share each batch"
    )
    hybrid_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="hybrid: share of a batch that PyAV decodes on CPU cores"
    )
    decoder_threads: Annotated[int, Field(ge=0)] = Field(0, description="threads; 0: one a core, at most 8 a rank")
    pipelines_per_gpu: _Positive = Field(1, description="DALI pipelines that take turns with the batches")
    prefetch: _Positive = Field(
        2, description="batches inside a DALI pipeline, and how many more are being decoded for it"
    )
    read_ahead: Annotated[int, Field(ge=0)] = Field(4, description="further batches whose bytes are fetched, if remote")
    cache_dir: str = Field("", description="folder for a cache of remote bytes; empty: none")
    cache_gb: Annotated[float, Field(gt=0)] = Field(50.0, description="size of that cache, 10^9 bytes")
    retries: Annotated[int, Field(ge=0)] = Field(5, description="further tries of a remote read, after growing waits")
    on_error: Literal["fail", "replace"] = Field("fail", description="a corrupt payload: stop, or use a neighbour")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name, channels in (("", 3), ("flow_", 2)):
            mean, std = getattr(self, f"{name}mean"), getattr(self, f"{name}std")
            if len(mean) != channels or len(std) != channels or min(std) <= 0:
                raise ValueError(
                    f"{name}mean and {name}std need {channels} values each, and {name}std none that is 0 or less"
                )
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError("scales must be one or more values in (0, 1]")
        if self.frame_jitter >= self.stride:
            raise ValueError(f"frame_jitter {self.frame_jitter} must be below stride {self.stride}")
        if self.dtype == "uint8" and self.padding == "zero":
            raise ValueError("padding=zero is the value 0 after normalization, which dtype=uint8 leaves out; use black")
        return self

    @property
    def jitters_colour(self) -> bool:
        """Whether any colour jitter is asked for."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


class ModelConfig(_Frozen):
    """I3D recognizer. The number of classes comes from the data set, feature sizes from the clip."""

    temporal: Literal["full", "top_heavy"] = Field("full", description="top_heavy: 1xkxk kernels up to Mixed_4c")
    stem: Literal["auto", "strided", "mean", "paired"] = Field(
        "auto",
        description="top_heavy: what the first convolution sees of each two frames: the first (as published), their "
        "mean, both; auto: mean, under compat=reference strided",
    )
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

    def stem_of(self, compat: str) -> str:
        """The stem that is meant under a `compat`."""
        return self.stem if self.stem != "auto" else "strided" if compat == "reference" else "mean"


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

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.data.dtype == "uint8":
            raise ValueError("data.dtype=uint8 gives pixels as they are; training takes float32 or float16")
        return self
