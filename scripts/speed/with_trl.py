"""Steps of TRL's RLOOTrainer, for scripts/benchmark.py. Its reference follows the policy, as WARP's anchor does."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl
from protocol import EMA_RATE, KL_COEF, LEARNING_RATE, STOP, Clock, Work, work_of_arguments
from with_torch import generation_options, make_model

PROMPTS, STEPS = 1000, 1_000_000  # more than any benchmark needs


def make_tokenizer(work: Work) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are named by the numbers of the tokens. None contains the name of the stop token."""
    words = {f"word{number}": number for number in range(work.vocab) if number != STOP}
    model = tokenizers.models.WordLevel({"<stop>": STOP, **words}, unk_token="<stop>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<stop>", "pad_token": "<stop>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def make_config(work: Work, folder: Path) -> trl.RLOOConfig:
    """One optimizer step for each batch of completions, in float32; nothing is logged or saved."""
    options = {} if work.is_mixed else generation_options(work)
    return trl.RLOOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=work.batch,
        num_generations=work.samples,
        max_completion_length=work.longest,
        generation_kwargs=options,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=KL_COEF,
        sync_ref_model=True,
        ref_model_mixup_alpha=EMA_RATE,
        ref_model_sync_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class EndsOfSteps(transformers.TrainerCallback):  # type: ignore[misc]  # the base class has no types
    """Reports each step, and waits for the next line of input before the next one."""

    def __init__(self, work: Work) -> None:
        self._work, self._clock, self.tokens, self.generate_s = work, Clock(), 0, 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """End a step."""
        self._clock.tick({"tokens": self.tokens, "generate_s": self.generate_s})

    def reward(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """Rewards that cost nothing, of completions whose tokens are counted."""
        self.tokens = sum(map(len, completion_ids))
        return [float(number) for number in range(len(completion_ids))]

    def timed(self, generate: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        """Generate with more arguments, and note the seconds. Raises ValueError for prompts of another size."""

        def run(input_ids: torch.Tensor, **kwargs: Any) -> Any:
            if input_ids.shape != (self._work.batch, self._work.prompt):
                raise ValueError(f"prompts: got {tuple(input_ids.shape)} tokens, want those of {self._work}")
            began = time.perf_counter()
            result = generate(input_ids=input_ids, **kwargs, **more)
            self.generate_s = time.perf_counter() - began
            return result

        return run


def train(work: Work, folder: Path) -> None:
    """Train until there is no more input."""
    make_model(work).save_pretrained(folder / "model")
    numbers = torch.randint(1, work.vocab, (PROMPTS, work.prompt)).tolist()
    prompts = [" ".join(f"word{number}" for number in row) for row in numbers]
    steps = EndsOfSteps(work)
    trainer = trl.RLOOTrainer(
        model=str(folder / "model"),
        reward_funcs=steps.reward,
        args=make_config(work, folder),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(work),
    )
    trainer.add_callback(steps)  # after TRL's own, which moves the reference
    # the trainer takes no processors of logits
    processors = {"logits_processor": generation_options(work)["logits_processor"]} if work.is_mixed else {}
    trainer.model.generate = steps.timed(trainer.model.generate, **processors)
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        train(work_of_arguments(), Path(name))
