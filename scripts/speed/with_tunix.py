"""Steps of Tunix's GRPO learner with RLOO's advantages, for scripts/benchmark.py. Its reference is fixed."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from protocol import KL_COEF, LEARNING_RATE, STOP, Clock, Work, work_of_arguments
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

STEPS = 1_000_000  # more than any benchmark needs


class Words:
    """A tokenizer whose words are the numbers of the tokens."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put before a prompt

    def eos_id(self) -> int:
        return -1  # no completion ends early

    def pad_id(self) -> int:
        return STOP


def make_model(work: Work) -> llama.Llama3:
    """The model with random weights."""
    config = llama.ModelConfig(
        num_layers=work.layers,
        vocab_size=work.vocab,
        embed_dim=work.width,
        hidden_dim=work.mlp,
        num_heads=work.heads,
        head_dim=work.width // work.heads,
        num_kv_heads=work.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    return llama.Llama3(config, rngs=nnx.Rngs(0))


def make_cluster(work: Work, mesh: jax.sharding.Mesh) -> rl_cluster.RLCluster:
    """One optimizer step for each batch of completions; nothing is saved."""
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE)),
            eval_every_n_steps=STEPS,
            max_steps=STEPS,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=work.longest,
            max_prompt_length=work.prompt,
            kv_cache_size=work.prompt + work.longest + 1,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[-1],
        ),
    )
    return rl_cluster.RLCluster(
        actor=make_model(work), reference=make_model(work), tokenizer=Words(), cluster_config=config
    )


def train(work: Work) -> None:
    """Train until there is no more input."""
    facts = {"tokens": 0.0, "generate_s": 0.0}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        cluster = make_cluster(work, mesh)
        generate = cluster.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = generate(*args, **kwargs)
            facts.update(tokens=sum(map(len, result.tokens)), generate_s=time.perf_counter() - began)
            return result

        cluster.generate = timed
        algorithm = grpo_learner.GRPOConfig(
            advantage_estimator="rloo", num_generations=work.samples, num_iterations=1, beta=KL_COEF
        )
        learner = grpo_learner.GRPOLearner(
            cluster, algorithm, lambda prompts, **more: [*map(float, range(len(prompts)))]
        )
        learner.train(batches(work, lambda: jax.block_until_ready(nnx.state(cluster.actor_trainer.model)), facts))


def batches(work: Work, finish: Callable[[], Any], facts: dict[str, float]) -> Iterator[dict[str, np.ndarray]]:
    """Prompts of each step. A step ends when the next one asks for its prompts and the device has finished."""
    rng, clock = np.random.default_rng(0), Clock()
    while True:
        rows = rng.integers(1, work.vocab, (work.batch // work.samples, work.prompt))
        yield {"prompts": np.array([" ".join(map(str, row)) for row in rows])}
        finish()
        try:
            clock.tick(facts)
        except SystemExit:  # this is a thread of the learner
            os._exit(0)


if __name__ == "__main__":
    train(work_of_arguments())
