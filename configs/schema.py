"""The configuration of a training run: frozen, typed models. Every key has its default and its unit here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from . import values

# YAML has lists only; the models are hashable, so sequences become tuples.
_Floats = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
_Positive = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_NonNegative = Annotated[float, Field(ge=0)]
# To YAML, a bare `off` is false.
_off = BeforeValidator(lambda v: "off" if v is False else v)
_Compile = Annotated[Literal["off", "default", "max-autotune"], _off]


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
    fixed_views: Annotated[int, Field(ge=0)] = Field(
        0, description="K: every video has only K training clips (window, crop, flip), which take turns; 0: no limit"
    )
    eval_clips: _Positive = Field(1, description="uniform clips a video in the evaluations during training")
    window_stride: _Positive = Field(30, description="frames from one training window to the next, for detection")
    eval_window_stride: _Positive = Field(128, description="frames from one test window to the next, for detection")
    shuffle_shards: Annotated[int, Field(ge=0)] = Field(
        0, description="K: shuffle the shards, then videos within each K of them, for remote storage; 0: all videos"
    )
    decoder: Literal["auto", "dali", "pyav", "hybrid"] = Field(
        "auto",
        description="auto: DALI (NVDEC) on a GPU from a megapixel a frame on, else PyAV; hybrid: both share each batch",
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
    stem: Literal["strided", "mean", "paired"] = Field(
        "strided",
        description="top_heavy: what the first convolution sees of each two frames: the first (as published), their "
        "mean, both with weights for each",
    )
    width: Annotated[float, Field(gt=0, le=4)] = Field(1.0, description="factor on all channels, steps of 1/16")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="PyTorch's meaning; 0.01 as published")
    freeze_bn: Literal["auto", "always", "never"] = Field(
        "auto", description="batch norm keeps its statistics in training; auto: a detector's that starts from init="
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.width * 16) % 1:
            raise ValueError(
                f"width {self.width} is no multiple of 1/16, so group norm's 32 groups would not divide the attention "
                "head's channels"
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
    logits: _NonNegative = Field(1.0, description="method=logits: student against teacher classes")
    temperature: Annotated[float, Field(gt=0)] = Field(4.0, description="method=logits: divides the logits")
    features: _NonNegative = Field(1.0, description="method=features: student against teacher features")
    segments: _NonNegative = Field(10.0, description="detection: weight of the segments' losses beside the classes'")
    overlap: _Fraction = Field(0.5, description="detection: IoU from which an anchor's refinement is an action")
    background: _NonNegative = Field(35.0, description="detection: the background view")
    triplet: _NonNegative = Field(0.1, description="detection: boundaries of the spliced window")
    attention_transfer: _NonNegative = Field(5.0, description="method=attention-transfer: maps of the features' energy")


class OptimizerConfig(_Frozen):
    """One optimizer and its schedule."""

    name: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="sgd and adam have their weight decay in the gradient, adamw beside it"
    )
    backend: Literal["torch", "apex"] = Field("torch", description="apex: NVIDIA's FusedSGD and FusedAdam")
    lr: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    betas: _Floats = Field((0.9, 0.999), description="adam and adamw only")
    weight_decay: _NonNegative = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: _NonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two values in [0, 1), not {list(self.betas)}")
        return self


class KernelsConfig(_Frozen):
    """The fused CUDA kernels of the losses."""

    backend: Literal["auto", "cuda", "torch"] = Field(
        "auto",
        description="auto: on a GPU, where they compile, else torch; cuda: or fail with the reason, though "
        "compat=reference's sums over the batch are torch's in any case; torch",
    )


class DistillConfig(_Frozen):
    """How the distill phase learns from its teacher."""

    method: Literal[
        "generative", "none", "generative-only", "attention-only", "logits", "features", "attention-transfer"
    ] = Field("generative", description="none: the student alone; the others are in trainers/methods")
    teacher_cache: str = Field(
        "", description="folder for the teacher's outputs of each view, with data.fixed_views; empty: none"
    )


class RanksConfig(_Frozen):
    """How the ranks of a run work together; without torchrun there is one."""

    timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds without progress after which a rank names the one it waits for, and all end"
    )
    affinity: Literal["auto", "off"] = Field(
        "auto", description="auto: the ranks of a node share out its cores, those near each one's GPU first"
    )
    compression: Literal["none", "bf16"] = Field("none", description="type in which gradients are reduced")
    sync_bn: bool = Field(False, description="batch norm's statistics over all ranks; on GPUs")


class TrainConfig(_Frozen):
    """Everything that decides a training run."""

    phase: Literal["teacher", "representation", "distill", "detect-teacher", "detect-representation", "detect-distill"]
    compat: Literal["none", "reference"] = Field("none", description="reference: what the original code does otherwise")
    alternate: Literal["auto", "step", "epoch"] = Field(
        "auto",
        description="step: stages A and B on every batch; epoch: all of A, then all of B, which reads and decodes the "
        "data twice; auto: step, under compat=reference epoch",
    )
    teacher: str = Field("", description="distill: the representation run, or a folder with its weights")
    init: str = Field("", description="run or weights to start from; representation starts from the teacher run")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: _Positive = 50
    batch_size: _Positive = Field(16, description="clips a step over all ranks")
    micro_batch: Annotated[int, Field(ge=0)] = Field(
        0, description="clips that a rank takes at once, whose gradients add up to a step's; 0: all of its share"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on a capable GPU, else fp32; tf32: fp32 whose products a GPU rounds to 10 bits, as it "
        "also does beside bf16 and fp16",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: _Compile = Field("off", description="torch.compile of what is trained and of the teacher")
    cuda_graphs: bool = Field(False, description="compiled parts are replayed as CUDA graphs; needs compile")
    grad_clip: _NonNegative = Field(0.0, description="largest gradient norm; 0: no limit")
    log_every: _Positive = Field(10, description="steps")
    checkpoint_every: _Positive = Field(500, description="steps; one is written at every epoch's end too")
    keep_checkpoints: _Positive = 2
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the weights' moving average, which is evaluated and saved; 0: none"
    )
    eval_every: Annotated[int, Field(ge=0)] = Field(1, description="epochs; 0: never")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluations in a row without a better top-1 after which the run ends; 0: never"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="which weights a finished run has in weights/; the best are in best/ in either case"
    )
    tensorboard: bool = True
    wandb: Annotated[Literal["off", "offline", "online"], _off] = Field(
        "off",
        description="Weights & Biases, of the extra `wandb`; offline: into RUN/wandb, for `wandb sync`. A run that is "
        "continued stays the same one there, by the id in RUN/wandb/genkd.json",
    )
    wandb_project: str = Field("genkd", min_length=1, description="project of Weights & Biases")
    wandb_name: str = Field("", description="name of the run there; empty: the run folder's")
    prometheus: Annotated[tuple[str, ...], BeforeValidator(values.as_prometheus)] = Field(
        (),
        description="metrics for Prometheus, at each log step: PATH.prom, a file of this run's own for node_exporter's "
        "textfile collector; HOST:PORT or :PORT, served at /metrics; or a list of such. They are listed in "
        "trainers/prometheus.py",
    )
    profile: Annotated[str, BeforeValidator(values.as_profile)] = Field(
        "",
        description="FIRST:LAST, steps from 0, without the last: PyTorch's profile of them, of every rank, as a Chrome "
        "trace and a table of the ten most expensive ops in RUN/profile/; empty: none",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    distill: DistillConfig = DistillConfig()
    loss: LossConfig = LossConfig()
    kernels: KernelsConfig = KernelsConfig()
    ranks: RanksConfig = RanksConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cvae_optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=1e-4)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.data.dtype == "uint8":
            raise ValueError("data.dtype=uint8 gives pixels as they are; training takes float32 or float16")
        if self.cuda_graphs and self.compile == "off":
            raise ValueError("cuda_graphs=true replays what torch.compile made: set compile=default or max-autotune")
        if self.micro_batch and (self.detects or self.compat == "reference"):
            what = "a detector's losses count the actions" if self.detects else "compat=reference's losses add up"
            raise ValueError(f"micro_batch: {what} of a whole batch; set micro_batch=0, and batch_size to what fits")
        if self.micro_batch and self.ranks.sync_bn:
            raise ValueError(
                "micro_batch and ranks.sync_bn: ranks with other numbers of parts would wait for each other; set only "
                "one of them, or model.freeze_bn=always"
            )
        if self.teacher and not self.distills:
            raise ValueError(f"teacher= is for the distill phases; {self.phase} starts from init=")
        if self.detects and self.distill.method in ("logits", "features", "attention-transfer"):
            raise ValueError(f"distill.method={self.distill.method} is for recognition; detection has none of these")
        if self.detects and self.distill.teacher_cache:
            raise ValueError("distill.teacher_cache is for recognition; a detector's windows do not come again")
        if (self.patience or self.keep == "best") and not self.eval_every:
            raise ValueError("patience and keep=best need evaluations: set eval_every to 1 or more")
        if self.distill.teacher_cache and not self.data.fixed_views:
            raise ValueError("distill.teacher_cache needs clips that come again: set data.fixed_views to 1 or more")
        return self

    @property
    def detects(self) -> bool:
        """Whether a detector is trained, and no recognizer."""
        return self.phase.startswith("detect-")

    @property
    def distills(self) -> bool:
        """Whether there may be a teacher."""
        return self.phase.endswith("distill")

    @property
    def passes(self) -> int:
        """Passes over the data in an epoch: 2 where the stages of a phase with a VAE take turns by epoch."""
        by_epoch = self.alternate == "epoch" or (self.alternate == "auto" and self.compat == "reference")
        has_vae = self.phase.endswith("representation") or (
            self.distills and self.distill.method in ("generative", "generative-only", "attention-only")
        )
        return 2 if by_epoch and has_vae else 1
