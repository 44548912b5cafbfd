"""The groups of a config, one class each: the type, range and rules of every setting.

Units, Greek letters, paper lines and default values stand beside each setting in `configs/default.py`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LARGEST = 2**31 - 1  # largest count: it must fit int32

Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]
Length = Annotated[int, Field(ge=2, le=LARGEST)]  # tokens of a sequence
NotNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]  # decay of one of Adam's moving averages
LearningRate = Annotated[float, Field(gt=0, le=100)]
Temperature = Annotated[float, Field(ge=0.001, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]
Eta = Annotated[float, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(gt=0, le=10**9)]
Minutes = Seconds
Lax = Field(strict=False)  # lists count as tuples, because JSON has no tuples


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"got {text!r}, which is not a regular expression: {error}") from error
    return text


def _distinct(etas: tuple[float, ...]) -> tuple[float, ...]:
    names = [f"{abs(eta):g}" for eta in etas]  # 6 digits, as evaluations are named
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"got {etas!r}, want distinct numbers: {name} is given twice (compared with 6 digits)")
    for eta, name in zip(etas, names, strict=True):
        if name == "1" and eta != 1:  # 1 is evaluated in any case
            raise ValueError(f"got {etas!r}, want 1.0 in place of {eta!r}, which has the same 6 digits")
    return etas


Pattern = Annotated[str, AfterValidator(_pattern)]


class Group(BaseModel):
    """A frozen group of settings. Values are not converted, numbers are finite, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Data(Group):
    """Rows of text, their fields and the sizes of their splits."""

    source: Annotated[str, Field(min_length=1)]
    task: dict[str, Any] = {}  # missing in older workdirs
    split: str
    text_field: Annotated[str, Field(min_length=1)]
    prompt_template: str
    chat: bool
    response_field: str = ""  # missing in older workdirs
    chosen_field: str = ""  # missing in older workdirs
    rejected_field: str = ""  # missing in older workdirs
    label_field: str
    reward_fraction: Fraction
    gold_fraction: Fraction
    prompts_fraction: Fraction

    @model_validator(mode="after")
    def _leave_rows_for_evaluation(self) -> "Data":
        total = self.reward_fraction + self.gold_fraction + self.prompts_fraction
        if total >= 1:
            raise ValueError(
                f"reward_fraction + gold_fraction + prompts_fraction: got {total:g}, want less than 1: the rest is for "
                "evaluation"
            )
        return self

    @model_validator(mode="after")
    def _responses_answer_prompts(self) -> "Data":
        if bool(self.chosen_field) != bool(self.rejected_field):
            name = "rejected_field" if self.chosen_field else "chosen_field"
            raise ValueError(f"{name}: got '', want a field: a pair has data.chosen_field and data.rejected_field")
        if self.chosen_field and self.chosen_field == self.rejected_field:
            raise ValueError(f"rejected_field: got {self.rejected_field!r}, want another field than data.chosen_field")
        for name in ("response_field", "chosen_field", "rejected_field"):
            field = getattr(self, name)
            if field and not self.prompt_template and not self.chat:
                raise ValueError(
                    f"{name}: got {field!r}, want data.prompt_template (such as '{{{self.text_field}}}') or data.chat "
                    "too: without them, a prompt is only the beginning of a text"
                )
            if field and not self.prompt_template and field == self.text_field:
                raise ValueError(f"{name}: got {field!r}, want another field than data.text_field, the prompt")
        return self

    @property
    def fractions(self) -> dict[str, float]:
        """Share of the rows of each split except the last, `eval`."""
        return {"reward": self.reward_fraction, "gold": self.gold_fraction, "prompts": self.prompts_fraction}


class Tokenizer(Group):
    """A byte-level BPE tokenizer trained on the texts."""

    vocab_size: Annotated[int, Field(ge=259, le=LARGEST)]  # 256 bytes and 3 special tokens


class RopeScaling(Group):
    """See `warp_jax.models.rope.RopeScaling`."""

    kind: Literal["none", "linear", "llama3", "yarn"]
    factor: Annotated[float, Field(gt=0)]
    original_length: Count
    low_frequency_factor: NotNegative
    high_frequency_factor: NotNegative
    beta_fast: NotNegative
    beta_slow: NotNegative
    attention_factor: NotNegative


class Architecture(Group):
    """Sizes of a model trained from scratch; see `warp_jax.models.transformer.TransformerConfig`."""

    width: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_dim: Count
    activation: Literal["silu", "gelu", "gelu_exact"]
    norm_eps: Annotated[float, Field(gt=0)]
    norm_offset: float
    post_norms: bool
    qk_norm: bool
    qkv_bias: bool
    query_scale: NotNegative
    attention_softcap: NotNegative
    final_softcap: NotNegative
    scale_embedding: bool
    tied_head: bool
    rope_theta: Annotated[float, Field(gt=0)]
    rope_theta_local: NotNegative
    local_pattern: Annotated[tuple[bool, ...], Lax, Field(min_length=1)]
    sliding_window: CountOrZero
    rope_scaling: RopeScaling


class Lora(Group):
    """Low-rank adapters that RL trains instead of weights; see `warp_jax.models.lora`."""

    rank: CountOrZero = 0
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Pattern = "layers/"


class Model(Group):
    """The policy: its source, its trained weights, and how it is computed."""

    source: str
    size: str
    trainable: Pattern
    lora: Lora = Lora()  # missing in older workdirs
    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "dots", "full"]
    logits_chunk: CountOrZero
    architecture: Architecture | None = None  # only without a source

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns that the name of a weight matches, all of them, if RL trains it or, with LoRA, adapts it."""
        return (self.trainable, self.lora.targets, "/kernel$") if self.lora.rank else (self.trainable,)


class Adam(Group):
    """Adam's settings, shared by SFT, reward model and RL."""

    b1: Moment
    b2: Moment
    eps: Annotated[float, Field(gt=0)]


class Optimization(Group):
    """Learning rate, its schedule, weight decay and clipping of one optimisation."""

    batch_size: Count
    learning_rate: LearningRate
    warmup_steps: CountOrZero
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"  # missing in older workdirs
    learning_rate_steps: CountOrZero = 0  # missing in older workdirs
    learning_rate_end: Rate = 0.0  # missing in older workdirs
    weight_decay: NotNegative = 0.0  # missing in older workdirs
    clip_norm: NotNegative

    @model_validator(mode="after")
    def _schedule_has_a_length(self) -> "Optimization":
        if self.learning_rate_schedule != "constant" and not self.learning_rate_steps:
            raise ValueError(
                f"learning_rate_steps: got 0, want at least 1 for learning_rate_schedule {self.learning_rate_schedule}"
            )
        return self


class Sft(Optimization):
    """Supervised fine-tuning."""

    num_steps: CountOrZero
    sequence_tokens: Length
    num_microbatches: Count = 1  # missing in older workdirs


class RewardModel(Optimization):
    """Training of the reward model on labelled texts or on pairs of responses."""

    batch_size: Annotated[int, Field(ge=2, le=LARGEST, multiple_of=2)]  # half of a batch has label 1, or is chosen
    loss: Literal["label", "bradley_terry"]
    num_layers: CountOrZero
    trainable: Pattern
    num_steps: Count
    sequence_tokens: Length


class RewardPart(Group):
    """One part of the reward."""

    source: str
    weight: float
    timeout: Seconds = 600.0  # missing in older workdirs


class Gold(Group):
    """The gold reward."""

    source: str
    max_terms: Count
    fragments_per_text: Count
    timeout: Seconds = 600.0  # missing in older workdirs


class Sampling(Group):
    """Lengths of prompts and completions, the distribution of the policy, and the chips that share its weights."""

    prompt_tokens: Length
    max_new_tokens: Count
    temperature: Temperature
    top_k: CountOrZero = 0  # missing in older workdirs
    top_p: Share = 1.0  # missing in older workdirs
    stop_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Lax] = ()  # missing in older workdirs
    tensor: CountOrZero = 0  # missing in older workdirs

    @property
    def truncates(self) -> bool:
        """True if training leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1

    @model_validator(mode="after")
    def _several_tokens_are_kept(self) -> "Sampling":
        if self.top_k == 1:
            raise ValueError("top_k: got 1, want 0 (all tokens) or at least 2: nothing is learned from a single choice")
        return self


class Rl(Optimization):
    """Policy gradient: lines 5 to 9 of Algorithm 1."""

    samples_per_prompt: Count
    num_microbatches: Count
    advantage: Literal["none", "batch_mean", "leave_one_out", "group_norm"]
    whiten: bool
    kl_coef: NotNegative
    kl_in: Literal["reward", "token_reward", "loss"] = "reward"  # missing in older workdirs
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # missing in older workdirs
    kl_schedule: Literal["constant", "linear", "cosine", "adaptive"] = "constant"  # missing in older workdirs
    kl_steps: CountOrZero = 0  # missing in older workdirs
    kl_coef_end: NotNegative = 0.0  # missing in older workdirs
    kl_target: NotNegative = 0.0  # missing in older workdirs
    kl_gain: Annotated[float, Field(ge=0, lt=5)] = 0.1  # missing in older workdirs
    updates_per_rollout: Count = 1  # missing in older workdirs
    clip_ratio: Literal["token", "sequence"] = "token"  # missing in older workdirs
    clip_low: Rate = 0.2  # missing in older workdirs
    clip_high: NotNegative = 0.2  # missing in older workdirs
    mask_truncated: bool = False  # missing in older workdirs
    truncation_penalty: NotNegative = 0.0  # missing in older workdirs
    importance_cap: NotNegative = 0.0  # missing in older workdirs

    @model_validator(mode="after")
    def _numbers_fit(self) -> "Rl":
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size: got {self.batch_size}, want a multiple of samples_per_prompt = {self.samples_per_prompt}"
            )
        if self.advantage in ("leave_one_out", "group_norm") and self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt: got 1, want at least 2 for advantage {self.advantage}")
        if 0 < self.importance_cap < 1:
            raise ValueError(
                f"importance_cap: got {self.importance_cap}, want 0 (off) or at least 1: a smaller cap shrinks all "
                "gradients"
            )
        if self.updates_per_rollout > 1 and self.importance_cap:
            raise ValueError(
                f"importance_cap: got {self.importance_cap}, want 0 with rl.updates_per_rollout above 1, which clips "
                "probability ratios"
            )
        if self.importance_cap and self.kl_in == "loss":
            raise ValueError(
                f'importance_cap: got {self.importance_cap}, want 0 with rl.kl_in "loss", which has no weight'
            )
        if self.kl_in == "token_reward" and self.advantage == "group_norm":
            raise ValueError(
                'advantage: got "group_norm", want another with rl.kl_in "token_reward", which it does not bound'
            )
        if self.updates_per_rollout > 1 and self.clip_ratio == "sequence" and self.kl_in == "token_reward":
            raise ValueError('kl_in: got "token_reward", want another for rl.clip_ratio "sequence"')
        return self

    @model_validator(mode="after")
    def _kl_schedule_is_whole(self) -> "Rl":
        kind = self.kl_schedule
        if kind in ("linear", "cosine") and not self.kl_steps:
            raise ValueError(f"kl_steps: got 0, want at least 1 for kl_schedule {kind}")
        if kind == "adaptive" and not self.kl_target:
            raise ValueError("kl_target: got 0.0, want more than 0 nats for kl_schedule adaptive")
        if kind in ("cosine", "adaptive") and not self.kl_coef:
            raise ValueError(f"kl_coef: got 0.0, want more than 0 for kl_schedule {kind}")
        return self


class Bema(Group):
    """Powers and lag of the anchor `bema`; see `warp_jax.training.anchors.bema`."""

    ema_power: NotNegative = 0.5
    bias_power: NotNegative = 0.2
    lag: Annotated[float, Field(ge=1)] = 10.0


class Warp(Group):
    """Iterations, runs, anchor and merge of Algorithm 1."""

    num_iterations: Count
    num_runs: Count
    steps_per_iteration: Annotated[tuple[Count, ...], Lax]
    ema_rate: Rate
    anchor: Literal["ema", "bema"] = "ema"  # missing in older workdirs
    anchor_every: Count = 1  # missing in older workdirs
    bema: Bema = Bema()  # missing in older workdirs
    merge: Literal[
        "slerp", "karcher", "slerp_symmetric", "lerp", "task_arithmetic", "model_stock", "slerp_full_weights"
    ]
    unit: Literal["layer", "tensor", "model"]
    liti_rate: Rate
    runs: Annotated[tuple[dict[str, Any], ...], Lax] = ()  # missing in older workdirs
    stop_at_kl: NotNegative = 0.0  # missing in older workdirs

    @model_validator(mode="after")
    def _iterations_and_runs_suffice(self) -> "Warp":
        if len(self.steps_per_iteration) != self.num_iterations:
            raise ValueError(
                f"steps_per_iteration: got {self.steps_per_iteration}, want warp.num_iterations = "
                f"{self.num_iterations} numbers"
            )
        if self.merge == "model_stock" and self.num_runs < 2:
            raise ValueError("num_runs: got 1, want at least 2 for warp.merge model_stock")
        if self.runs and len(self.runs) != self.num_runs:
            raise ValueError(f"runs: got {len(self.runs)} entries, want warp.num_runs = {self.num_runs} or none")
        return self


class Keep(Group):
    """Weights of a run that are kept and evaluated, in addition to its last policy."""

    anchor: bool = False
    steps: Annotated[tuple[Count, ...], Lax] = ()

    @model_validator(mode="after")
    def _steps_rise(self) -> "Keep":
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps: got {self.steps}, want rising numbers")
        return self


class Front(Group):
    """The points of the reported front."""

    etas: Annotated[tuple[Eta, ...], Lax, Field(min_length=1), AfterValidator(_distinct)]
    kl_budget: NotNegative


class Evaluation(Group):
    """Held-out prompts, and how often a run is evaluated."""

    num_prompts: Count
    samples_per_prompt: Count = 1  # missing in older workdirs
    batch_size: Count
    every: Count
    temperature: Temperature | None = None  # missing in older workdirs
    dtype: Literal["float32", "bfloat16"]
    pass_threshold: float | None = None  # missing in older workdirs
    text: str = ""  # missing in older workdirs, and the three below
    text_field: Annotated[str, Field(min_length=1)] = "text"
    text_rows: Count = 256
    text_tokens: Length = 128

    @model_validator(mode="after")
    def _batches_are_full(self) -> "Evaluation":
        completions = self.num_prompts * self.samples_per_prompt
        if completions % self.batch_size:
            raise ValueError(
                f"num_prompts: got {self.num_prompts} (times samples_per_prompt = {completions} completions), want a "
                f"multiple of evaluation.batch_size = {self.batch_size}"
            )
        if self.text and self.text_rows % self.batch_size:
            raise ValueError(
                f"text_rows: got {self.text_rows}, want a multiple of evaluation.batch_size = {self.batch_size}"
            )
        return self


class Health(Group):
    """Limits of a run (0 = no limit), and the action beyond them."""

    action: Literal["warn", "stop"] = "warn"
    max_kl: NotNegative = 200.0
    max_length_ratio: NotNegative = 4.0
    max_truncated: Rate = 0.0
    min_distinct_2: Rate = 0.1
    max_gold_drop: NotNegative = 4.0

    @model_validator(mode="after")
    def _ratio_is_above_one(self) -> "Health":
        if 0 < self.max_length_ratio <= 1:
            raise ValueError(f"max_length_ratio: got {self.max_length_ratio}, want 0 (no limit) or more than 1")
        return self


class Logging(Group):
    """Where metrics are sent, in addition to the files of the workdir."""

    wandb_project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]*$")] = ""


class Report(Group):
    """Contents of the report."""

    num_samples: Count
    bootstrap_resamples: Count
