"""The losses of SFT and of the reward model against hand arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from warp_jax.parallel import meshes
from warp_jax.training import loop, supervised

COUNTED_LAST = np.arange(12) >= 12 - np.array([1, 1, 2, 1, 9, 1, 3, 1])[:, None]  # tokens of eight rows


def _scores(params, token_ids, mask, cache=None, num_outputs=0):
    return params[token_ids], None


def test_language_loss_is_the_next_tokens():
    """Fails when targets are not shifted, or padding is counted."""
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.7, 0.3]]))
    batch = {"token_ids": jnp.array([[0, 1, 1, 0]]), "mask": jnp.array([[False, True, True, True]])}
    loss, _ = supervised.language_loss(_scores, logits, batch)
    assert float(loss) == pytest.approx(-(np.log(0.3) + np.log(0.7)) / 2, rel=1e-6)


def test_only_counted_tokens_have_a_loss():
    """Fails when a token that does not count has a loss, also as the last one before those that do."""
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.7, 0.3]]))
    batch = {"token_ids": jnp.array([[0, 1, 1, 0]]), "mask": jnp.ones((1, 4), bool)}
    counted = {supervised.COUNTED: jnp.array([[False, False, True, True]])}
    loss, metrics = supervised.language_loss(_scores, logits, batch | counted)
    assert float(loss) == pytest.approx(-(np.log(0.3) + np.log(0.7)) / 2, rel=1e-6)
    assert float(metrics[supervised.ROW_VALUES][0]) == pytest.approx(-np.log(0.3 * 0.7), rel=1e-6)


def test_label_loss_is_binary_cross_entropy():
    """Fails when labels are inverted, or scores are used as probabilities."""
    scores = jnp.array([0.0, 2.0, -1.0])
    batch = {"token_ids": jnp.array([[0, 1], [0, 2]]), "mask": jnp.ones((2, 2), bool), "labels": jnp.array([1, 1])}
    loss, metrics = supervised.label_loss(_scores, scores, batch)
    assert float(loss) == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(1))) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_bradley_terry_prefers_the_first_half():
    """Fails when the pair is swapped, or rows are paired as neighbours."""
    scores = jnp.array([0.0, 2.0, -1.0, 0.5, 0.7])
    batch = {"token_ids": jnp.array([[1], [2], [3], [4]]), "mask": jnp.ones((4, 1), bool)}
    loss, metrics = supervised.bradley_terry_loss(_scores, scores, batch)
    margins = np.array([2.0 - 0.5, -1.0 - 0.7])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_reward_batches_hold_label_one_first():
    """Fails when the halves are swapped: Bradley-Terry would learn the opposite."""
    labels = np.array([0, 1, 0, 0, 1, 1, 0, 1])
    chosen = supervised.paired_rows(labels, 6, 1, seed=0, stream="s")
    assert labels[chosen].tolist() == [1, 1, 1, 0, 0, 0]


def test_training_and_held_out_batches_are_kept_apart(tmp_path):
    """Fails when held-out batches are trained on, training batches are measured, the frozen leaves are left out, or one
    batch comes again and again."""

    def loss_fn(params, batch):
        loss = params["final_norm"]["scale"][0] * batch["x"].mean() + params["score"]["kernel"][0, 0]
        return loss, {"loss": loss}

    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    start, frozen = {"final_norm": {"scale": jnp.array([2.0])}}, {"score": {"kernel": jnp.array([[10.0]])}}
    batch_fn, held_out_batch = (lambda n, x=x: {"x": np.full(2, x + n, np.float32)} for x in (1, 100))
    task = supervised.Task(loss_fn, start, frozen, batch_fn, held_out_batch)
    losses = []
    schedule = loop.Schedule(3, tmp_path, 100, lambda done, values: losses.append(values.get("loss")))
    trained = supervised.fit(task, optax.sgd(0.1), mesh, schedule)
    assert losses[1:] == pytest.approx([12.0, 10 + 2 * 1.9, 10 + 3 * 1.7], rel=1e-5)  # gradients 1, 2 and 3
    assert trained["final_norm"]["scale"].tolist() == pytest.approx([2 - 0.1 * (1 + 2 + 3)])
    assert supervised.held_out(task, trained | frozen, 2, mesh)["loss"] == pytest.approx(10 + 1.4 * 100.5)


def test_the_held_out_loss_is_a_mean_over_tokens():
    """Fails when each held-out batch counts the same, however many tokens it has."""
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.7, 0.3]]))
    lengths = (2, 4)  # one counted token, then three
    batches = [{"token_ids": np.array([[0, 1, 1, 0]]), "mask": np.arange(4)[None] >= 4 - n} for n in lengths]
    loss_fn = functools.partial(supervised.language_loss, _scores)
    task = supervised.Task(loss_fn, logits, {}, None, batches.__getitem__, weight=supervised.num_counted)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    want = -(np.log(0.7) + np.log(0.8) + np.log(0.3) + np.log(0.7)) / 4
    assert supervised.held_out(task, logits, 2, mesh)["loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("parts", "counted"), [(2, {}), (4, {}), (4, {supervised.COUNTED: COUNTED_LAST})])
def test_microbatches_change_nothing(parts, counted):
    """Fails when parts are averaged as if they had equally many tokens, or by tokens that the loss does not count;
    their gradients are summed, or the losses of the rows come back in another order."""
    generator, size = np.random.default_rng(0), 12
    lengths = np.array([2, 12, 3, 3, 12, 2, 5, 2])
    mask = np.arange(size) >= size - lengths[:, None]
    batch = {"token_ids": generator.integers(0, 5, mask.shape), "mask": mask, supervised.ROW: np.arange(8), **counted}
    mesh = meshes.make_mesh((2, 1, 1), jax.devices()[:2])
    table = {"embed": {"embedding": jnp.asarray(generator.normal(size=(6, 6)), jnp.float32)}}

    def apply_fn(params, *args, **options):
        return _scores(params["embed"]["embedding"], *args)

    loss_fn = functools.partial(supervised.language_loss, apply_fn)
    found = []
    for number in (1, parts):
        programs = supervised.make_programs(mesh, loss_fn, table, optax.sgd(1.0), number)
        args = programs.init(table), {}, meshes.put_batch(mesh, batch)
        trace = programs.trace(*args)
        state, metrics = programs.update(*args)
        found.append((state[0], {k: v for k, v in metrics.items() if k != loop.BAD_ROWS}, trace))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)
    total = float(np.asarray(found[0][2].row_values).sum())
    assert float(found[1][1]["loss"]) == pytest.approx(total / supervised.counted_tokens(batch).sum(), rel=1e-5)
