"""The gold reward: tf-idf and logistic regression, fitted on labelled texts that the reward model never sees.

It is only used for evaluation, never for training, so it shows when a policy exploits the reward model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from warp_jax import files


class GoldReward(NamedTuple):
    """A fitted classifier. terms: words and word pairs; idf and weights: float64 [terms]; bias: log-odds."""

    terms: list[str]
    idf: np.ndarray
    weights: np.ndarray
    bias: float

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
    ) -> np.ndarray:
        """Text reward: the log-odds that prompt + completion is positive."""
        vectorizer = _make_vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return vectorizer.transform(texts) @ self.weights + self.bias


def fit(texts: Sequence[str], labels: Sequence[int], max_terms: int) -> GoldReward:
    """Fit on texts with labels 0 or 1. max_terms: the most frequent words and word pairs to keep."""
    vectorizer = _make_vectorizer(max_features=max_terms, min_df=2)
    features = vectorizer.fit_transform(texts)
    model = LogisticRegression(C=1.0, solver="liblinear").fit(features, labels)
    terms = vectorizer.get_feature_names_out().tolist()
    return GoldReward(terms, vectorizer.idf_, model.coef_[0], float(model.intercept_[0]))


def auc(gold: GoldReward, texts: Sequence[str], labels: Sequence[int]) -> float:
    """Probability that a positive text scores higher than a negative one."""
    return float(roc_auc_score(labels, gold.score([""] * len(texts), texts)))


def save(gold: GoldReward, path: Path) -> None:
    """Write the gold reward as JSON."""
    files.write_text(path, json.dumps(gold._asdict(), default=np.ndarray.tolist))


def load(path: Path) -> GoldReward:
    """Read a gold reward that `save` wrote."""
    fields = files.read_json(path)
    return GoldReward(fields["terms"], np.array(fields["idf"]), np.array(fields["weights"]), fields["bias"])


def _make_vectorizer(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)
