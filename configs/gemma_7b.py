"""The paper's setting: Gemma 7B on conversations, with a large reward model [P s4].

  python -m warp_jax.main --config=configs/gemma_7b.py --workdir=runs/gemma_7b

It needs an SFT policy and a reward model with one label, both as Hugging Face folders, and conversations as JSONL. The
paper publishes neither its data nor its reward model. [P ...] cites the paper (arXiv 2406.16768, s = section); [ours]
marks what it does not report. Never run, because there was no TPU: run time and result are unknown. I = 5 and M = 2
give 66,000 optimiser steps in all. docs/scaling.md has the TPU slices that it fits.
"""

from ml_collections import ConfigDict

from warp_jax.configs import pretrained


def get_config() -> ConfigDict:
    config = pretrained.get_config()
    config.mesh = (1, -1, 4)  # heads split over 4 chips, the batch over groups of 4, weights over all chips [ours]
    config.checkpoint_every = 100  # [ours]

    config.model.source = "models/gemma-7b-sft"  # Gemma "7B", 28 layers, fine-tuned [P s4 Setup]
    config.model.size = "gemma_7b"
    config.model.dtype = "bfloat16"  # of activations; weights, anchor and merges stay float32 [ours]
    config.model.remat = "full"  # [ours]

    config.data.source = "data/conversations.jsonl"  # conversation prompts; the paper's are not public [P s4 Setup]
    config.data.text_field = "messages"  # [ours]
    config.data.label_field = ""
    config.data.chat = True  # Gemma's template [ours]
    config.data.reward_fraction = 0.001  # as small as possible: nothing is trained on these two splits
    config.data.gold_fraction = 0.001
    config.data.prompts_fraction = 0.95  # the rest is held out [P s4.5 reports no number]

    with config.unlocked():
        del config.rewards.sentiment
        config.rewards.preference = {"source": "models/reward", "weight": 1.0}  # "high capacity" [P s4 Setup]
    config.gold.source = ""  # none: the paper's reward model was the largest available [P s4]

    config.sampling.prompt_tokens = 512  # [ours]
    config.sampling.max_new_tokens = 512  # [ours; mean outputs have 270 to 315 tokens, P Fig. 18a]
    config.sampling.temperature = 0.9  # [P s4 Setup]
    config.sampling.tensor = 8  # each chip reads an eighth of the weights per token [ours]

    config.rl.batch_size = 128  # [P s4 Setup]
    config.rl.samples_per_prompt = 4  # [ours]
    config.rl.num_microbatches = 1  # every microbatch gathers all weights three times [ours]
    config.rl.advantage = "leave_one_out"  # [ours; the paper says "a variant of REINFORCE" and no baseline]
    config.rl.kl_coef = 0.1  # beta [P s4 Setup]
    config.rl.learning_rate = 1e-6  # Adam [P s4 Setup]
    config.rl.warmup_steps = 100  # [P s4 Setup]
    config.rl.clip_norm = 1.0  # [ours]

    config.warp.num_iterations = 5  # I [P s4.3]
    config.warp.num_runs = 2  # M [P s4.3]
    config.warp.steps_per_iteration = (9000, 7000, 7000, 5000, 5000)  # T [P s4.3]
    config.warp.ema_rate = 0.01  # mu [P Fig. 15; section 4.1 once says 0.1, most likely a slip]
    config.warp.merge = "slerp"  # lambda = 1/2, one angle per layer [P s3.2, s4 Setup]
    config.warp.liti_rate = 0.3  # eta [P s4.3]

    config.front.etas = (0.1, 0.3, 0.5, 0.8, 1.0)  # [P s3.3]
    config.front.kl_budget = 0.0
    config.evaluation.num_prompts = 1024  # [ours]
    config.evaluation.dtype = "bfloat16"  # about six times faster than float32; rounding adds to each KL to SFT [ours]
    config.evaluation.batch_size = 128  # [ours]
    config.evaluation.every = 100  # [P s4 Setup]
    return config
