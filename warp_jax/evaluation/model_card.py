"""The model card of an exported policy: README.md with front matter for the Hugging Face Hub."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from warp_jax.files import hub
from warp_jax.settings import Settings

FILE = "README.md"
MEASURES = {"reward": "reward", "gold_reward": "gold reward", "sft_kl": "KL to SFT, nats per completion"}
PAPER = "[WARP](https://arxiv.org/abs/2406.16768)"


def make(
    settings: Settings,
    report: Mapping[str, Any],
    *,
    measured: Mapping[str, Mapping[str, float]],
    commands: tuple[str, str],
) -> str:
    """The text of the card.

    Args:
        settings: of the workdir.
        report: the content of warp_export.json.
        measured: `measure.summary` of "this model" and of "SFT" on held-out prompts, as far as they were evaluated.
        commands: the command lines of the training and of the export; "" = not recorded.
    """
    source = settings.model.source
    base = f"`{source}`" if source else "none: the weights were random before SFT"
    parts = [
        _front_matter(settings, report),
        f"# {report['stage']} of a WARP run\n\nTrained with warp_jax.",
        f"- Base model: {base}\n- Data: `{settings.data.source}`, split `{settings.data.split}`",
        f"## Method\n\n{_method(settings)}\n\n{_stage(settings, report['stage'])}",
        f"## Measured\n\n{_table(measured, report, settings.evaluation_temperature)}",
        f"## Rounding\n\n{_rounding(report)}",
        f"## Commands\n\n{_commands(*commands)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(settings: Settings, report: Mapping[str, Any]) -> str:
    """YAML for the Hub. A text in JSON is also one in YAML."""
    source, is_adapter = settings.model.source, "cut" in report
    fits = source.startswith(hub.PREFIX) and not (is_adapter and settings.sft.num_steps)  # an adapter is one of SFT
    base = [f"base_model: {json.dumps(hub.parse(source).repo)}"] if fits else []
    task = "text-classification" if report["stage"] == "reward_model" else "text-generation"
    library = f"library_name: {'peft' if is_adapter else 'transformers'}"
    lines = ["# license: choose one that the licence of the base model allows", *base, library]
    lines += [f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in ("warp", "rlhf", "model-merging"))]
    return "\n".join(["---", *lines, "---"])


def _method(settings: Settings) -> str:
    warp, rl = settings.warp, settings.rl
    steps = ", ".join(map(str, warp.steps_per_iteration))
    parts = ", ".join(f"{part.weight:g} x `{part.source}`" for part in settings.reward_parts.values())
    gold = f"`{settings.gold.source}`" if settings.gold.source else "none"
    anchor = f"ema, rate {warp.ema_rate:g}" if warp.anchor == "ema" else warp.anchor
    others = ", ".join(f"`{path} = {value!r}`" for path, value in _optional(settings))
    return (
        f"{PAPER} with {warp.num_iterations} iterations of {warp.num_runs} runs of RL ({steps} steps, {rl.batch_size} "
        f"completions each, at temperature {settings.sampling.temperature:g}), a KL penalty of {rl.kl_coef:g} to an "
        f"anchor ({anchor}), the merge `{warp.merge}` by {warp.unit}, and eta = {warp.liti_rate:g} between iterations. "
        f"The reward is {parts}; the gold reward, which nothing was trained on, is {gold}."
        + (f" Other settings: {others}." if others else "")
    )


def _optional(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Settings of the runs that a config may leave out, and that are not at their defaults."""
    warp = settings.warp
    groups = {"model.lora": settings.model.lora, "sampling": settings.sampling, "rl": settings.rl, "warp": warp}
    for path, group in (groups | {"warp.bema": warp.bema}).items():
        for name, field in type(group).model_fields.items():
            value = getattr(group, name)
            if not field.is_required() and value != field.default and name not in ("anchor", "bema"):
                yield f"{path}.{name}", value


def _stage(settings: Settings, stage: str) -> str:
    kind, _, eta = stage.partition(":")
    if kind == "liti":
        last = settings.warp.num_iterations
        return f"This model is (1 - eta) SFT + eta merge of iteration {last}, with eta = {eta}."
    if kind in ("sft", "reward_model"):
        return "This model is SFT, where RL began." if kind == "sft" else "This model is the reward model."
    return f"This model is the stage `{stage}`, without interpolation towards SFT (eta = 1)."


def _table(measured: Mapping[str, Mapping[str, float]], report: Mapping[str, Any], temperature: float) -> str:
    """Means and standard errors on the held-out prompts of the job."""
    if "this model" not in measured:
        return "The job has no evaluation of this stage." + _compared(report)
    rows = [["", *measured], ["---"] * (len(measured) + 1)]
    for name, meaning in MEASURES.items():
        cells = [f"{row[name]:.4f} +- {row[f'{name}_se']:.4f}" for row in measured.values()]
        rows.append([meaning, *("-" if "nan" in cell else cell for cell in cells)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Mean +- standard error on held-out prompts, at temperature {temperature:g}:\n\n{table}{_compared(report)}"


def _compared(report: Mapping[str, Any]) -> str:
    """Reward and KL of the rounded weights, on the prompts of the export."""
    compared = report.get("compared", {})
    if "reward" not in compared:
        return ""
    return f"\n\nWith the weights as they are stored here, on {compared['completions']} completions: " + ", ".join(
        f"{MEASURES[name]} {compared[name]['exported']:.4f} (before rounding {compared[name]['stage']:.4f})"
        for name in ("reward", "sft_kl")
    )


def _rounding(report: Mapping[str, Any]) -> str:
    text = f"Training was in float32; these weights are {report['dtype']}."
    if "cut" in report:
        text += (
            f" They are a LoRA adapter of SFT, which lacks {report['cut']['total']:.3g} of the change from SFT "
            "(relative Frobenius norm)."
        )
    kept = report.get("delivered", {})
    if kept.get("share") is not None:  # of SFT, there is no change to keep
        text += (
            f" They keep the share {kept['share']:.6g} of the change from SFT, with a relative error of "
            f"{kept['relative_error']:.3g}."
        )
    return " ".join([text, *(f"Warning: {line}." for line in report["warnings"])])


def _commands(train: str, export: str) -> str:
    lines = [line or "# not recorded" for line in (train, export)]
    return "```sh\n" + "\n".join(lines) + "\n```"
