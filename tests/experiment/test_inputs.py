"""Reward functions are called on a few rows before a job starts."""

import pytest

from tests.settings_of import settings_of
from warp_jax.data.corpus import Corpus
from warp_jax.experiment import ingredients, inputs
from warp_jax.parallel import hosts
from warp_jax.rewards import text_reward
from warp_jax.types import RewardError

MODULE = """
seen = []

def good(*batch):
    seen.append(batch)
    return [1.0] * len(batch[0])

def no_empty(prompts, completions, rows):
    return [len(text) / text.count(text[0]) for text in completions]

def eval_rows(prompts, completions, rows):
    return [float(row["label"]) for row in rows]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "users_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import users_rewards

    users_rewards.seen.clear()
    return users_rewards


def _corpora():
    prompts = [{"text": f"prompt {i} of a text {'word ' * 20}", "label": i} for i in range(3)]
    held_out = [{"text": f"held out {i} of a text {'word ' * 20}", "label": None} for i in range(9)]
    splits = {"prompts": prompts, "eval": held_out}
    return {
        name: Corpus([row["text"] for row in rows], [0] * len(rows), rows, [name] * len(rows))
        for name, rows in splits.items()
    }


def _try(template="", **sources):
    changes = {name.replace("_", "."): f"users_rewards:{function}" for name, function in sources.items()}
    inputs.try_rewards(settings_of({**changes, "data.prompt_template": template}), _corpora())


@pytest.mark.parametrize("template", ["", "Q: {text}"])
def test_every_function_is_called_on_rows_of_its_splits(functions, template):
    """Fails when the gold function or a split is left out, rows and prompts do not belong together, the template is
    not filled, or no completion is empty.
    """
    _try(template, rewards_sentiment_source="good", gold_source="good")
    assert [batch[2][0]["text"][:8] for batch in functions.seen] == ["prompt 0", "held out", "held out"]
    for prompts, completions, rows in functions.seen:
        assert len(prompts) == len(completions) == len(rows) == 4
        filled = [(template or "{text}").format(**row) for row in rows]
        assert all(text.startswith(prompt) for prompt, text in zip(prompts, filled, strict=True))
        assert min(map(len, prompts)) > 8
        assert completions[0] == ""
        assert completions[3] in rows[3]["text"].removeprefix(prompts[3])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"rewards_sentiment_source": "no_empty"}, "sentiment.source .*: raised IndexError.*row 0 of split 'prompts'"),
        ({"rewards_sentiment_source": "eval_rows"}, "sentiment.source .*: raised TypeError.*row 0 of split 'eval'"),
        ({"gold_source": "eval_rows"}, "config.gold.source 'users_rewards:eval_rows': raised TypeError"),
    ],
)
def test_a_function_that_fails_is_refused(functions, sources, message):
    """Fails when it is called on rows of one split only, or never with an empty completion."""
    with pytest.raises(RewardError, match=message):
        _try(**sources)


def test_every_function_has_its_time_limit(functions, monkeypatch):
    """Mutation: a door that loads a function, or the function that it loads, has no limit or that of another group."""
    load, loaded = text_reward.load_function, []
    monkeypatch.setattr(
        text_reward, "load_function", lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1]
    )
    names = {"rewards.sentiment.source": "users_rewards:good", "gold.source": "users_rewards:good"}
    settings = settings_of({**names, "rewards.sentiment.timeout": 20.0, "gold.timeout": 30.0})
    inputs.try_rewards(settings, _corpora())
    for part in (settings.reward_parts["sentiment"], settings.gold):
        inputs._check_reward("x", part, (), use_chat=False)
        ingredients.Maker(settings, None, None, None, None, None).text_fn("x", part)
    assert [function.timeout for function in loaded] == [20.0, 30.0] + [20.0] * 2 + [30.0] * 2


def test_only_the_first_process_tries_the_functions(functions, monkeypatch):
    """Mutation: every process of a job calls them, a judge behind an API for example."""
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    _try(rewards_sentiment_source="good")
    assert functions.seen == []


def test_a_function_that_only_a_run_uses_is_called(functions):
    """Fails when a part without a weight in the config is found to be broken in the first step of a run."""
    part = {"source": "users_rewards:no_empty", "weight": 0.0, "timeout": 600.0}
    settings = settings_of({"rewards.mine": part, "warp.runs": ({"rewards.mine.weight": 1.0}, {})})
    with pytest.raises(RewardError, match=r"rewards\.mine\.source .*: raised IndexError"):
        inputs.try_rewards(settings, _corpora())
