"""Linear probes: how well a linear model predicts a task's labels from frozen features, and from those of baselines.

All rows of the table have the same splits and the same classifier, with cross-validated regularization strength. The
features of a model come from the layer that is best on a validation split. Only this file imports scikit-learn.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse
import scipy.stats
from sklearn import metrics
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, RidgeCV
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from mlm.downstream import tasks
from mlm.downstream.features import encode_texts, encode_words, extract
from mlm.downstream.tasks import Examples, Task
from mlm.errors import UserError
from mlm.load import LoadedModel, random_params

# Maximum number of training labels: more change little and take minutes (BabyLM cuts MNLI and QQP to 10,000, too).
MAX_TRAIN = 10_000
# Fraction of the training examples that choose the layer. With fewer than `_FEW_LABELS` labels, `_REPEATS` splits
# choose it together: a single split of 25 labels has five, which would rank the layers by chance.
_VALIDATION_FRACTION = 0.2
_FEW_LABELS = 500
_REPEATS = 10
_FOLDS = 3
# Regularization strengths for standardized features, and the one with which layers are compared.
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_LAYER_CHOICE_STRENGTH = 1e-1
# Strengths for TF-IDF vectors, which have norm 1 and are mostly zero.
_SPARSE_STRENGTHS = (1.0, 10.0, 100.0)
_RIDGE_STRENGTHS = tuple(10.0**power for power in range(-1, 6))


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predicted: np.ndarray) -> float:
        # A constant prediction has no correlation; it counts as none.
        return 0.0 if np.ptp(predicted) == 0 or np.ptp(labels) == 0 else float(function(labels, predicted).statistic)

    return score


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """GLUE's F1: for the second of two classes, "equivalent" or "duplicate"."""
    positive = {"equivalent", "duplicate"} & set(labels.tolist())
    label = positive.pop() if positive else np.unique(labels)[-1]
    return float(metrics.f1_score(labels == label, predicted == label))


# Wang et al. 2019, "GLUE", table 1, and the macro average of F1.
METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda labels, predicted: float(metrics.accuracy_score(labels, predicted)),
    "macro_f1": lambda labels, predicted: float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
    "f1": _f1,
    "matthews": lambda labels, predicted: float(metrics.matthews_corrcoef(labels, predicted)),
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices of labels.

    Attributes:
      train: labels to train on.
      test: labels to predict.
      choices: pairs (fit, valid) of parts of `train`, which choose the layer.
    """

    train: np.ndarray
    test: np.ndarray
    choices: Sequence[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of one kind of features.

    Attributes:
      name: the features.
      scores: metric -> one score per seed.
      layers: the chosen layer per seed, 0 for the embeddings; empty for other features.
    """

    name: str
    scores: Mapping[str, Sequence[float]]
    layers: Sequence[int] = ()

    def mean(self, metric: str) -> float:
        """Returns the mean over seeds."""
        return float(np.mean(self.scores[metric]))

    def spread(self, metric: str) -> float:
        """Returns the standard deviation over seeds (of the sample); 0 for one seed."""
        scores = self.scores[metric]
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The table of a task.

    Attributes:
      task: its name.
      rows: the model, then the baselines.
      train, test: numbers of training labels and of held-out labels.
      classes: number of classes; 0 for regression.
      num_truncated: number of texts longer than the model, which were cut.
      max_length: the model's number of tokens.
    """

    task: str
    rows: Sequence[Row]
    train: int
    test: int
    classes: int
    num_truncated: int
    max_length: int


def probe(loaded: LoadedModel, task: Task, *, name: str, seeds: int, train_examples: int | None = None) -> ProbeResult:
    """Scores a model's features and the baselines on a task.

    Args:
      loaded: the model.
      task: the task.
      name: the model's name in the table.
      seeds: number of splits, and of models with random weights.
      train_examples: number of texts or sentences to train on, different ones for each seed; None for all.

    Raises:
      UserError: there are fewer than `train_examples`, or that is too few.
    """
    limited = dataclasses.replace(task, train=task.train.limited(MAX_TRAIN))
    examples = limited.train if task.test is None else limited.train.joined(task.test)
    max_length = loaded.max_tokens
    if examples.words is not None:
        inputs = encode_words(loaded.tokenizer, examples.words, max_length=max_length)
    else:
        inputs = encode_texts(loaded.tokenizer, examples.texts, examples.pairs, max_length=max_length)
    keep_mask = inputs.keep_mask
    labels, groups = examples.labels[keep_mask], examples.groups[keep_mask]
    splits = [_split(limited, examples, groups, seed=seed, train_examples=train_examples) for seed in range(seeds)]
    is_words = examples.words is not None
    words = None
    if examples.words is not None:
        words = np.array([word.lower() for of_text in examples.words for word in of_text])[keep_mask]
    scorer = _Scorer(labels, task.metrics, is_regression=task.is_regression, words=words)
    rows = [scorer.layers(name, [extract(loaded, inputs, label="model")] * seeds, splits)]
    untrained = (
        extract(_random_weights(loaded, seed), inputs, label=f"random weights, {seed + 1} of {seeds}")
        for seed in range(seeds)
    )
    rows.append(scorer.layers("random weights", untrained, splits))
    rows.append(
        scorer.sparse("words and neighbors" if is_words else "TF-IDF", _sparse_features(examples, keep_mask), splits)
    )
    rows.append(scorer.constant("mean" if task.is_regression else "majority class", splits))
    return ProbeResult(
        task=task.name,
        rows=rows,
        train=len(splits[0].train),
        test=len(splits[0].test),
        classes=len(task.classes),
        num_truncated=inputs.sequences.num_truncated,
        max_length=max_length,
    )


def ridge_accuracy(features_NxD: np.ndarray, labels: np.ndarray, *, train: np.ndarray, test: np.ndarray) -> float:
    """Returns the accuracy of a ridge classifier, which is fitted many times faster than logistic regression.

    Leave-one-out cross-validation chooses its strength.

    Args:
      features_NxD: the features.
      labels: N classes.
      train, test: the rows to train on, and those to predict.
    """
    # In float64, because leave-one-out errors are differences of nearly equal numbers.
    scaler = StandardScaler().fit(features_NxD[train].astype(np.float64))
    with threadpool_limits(1):
        model = RidgeClassifierCV(_RIDGE_STRENGTHS).fit(scaler.transform(features_NxD[train]), labels[train])
    return float(model.score(scaler.transform(features_NxD[test]), labels[test]))


def _split(task: Task, examples: Examples, groups: np.ndarray, *, seed: int, train_examples: int | None) -> Split:
    """Returns the split of a seed.

    Args:
      task: the task.
      examples: those of the task, then those of its test file.
      groups: int [labels], the number of each label's example.
      seed: of the split.
      train_examples: number of examples to train on; None for all.
    """
    if task.test is None:
        train, test = tasks.split_rows(task.train, fraction=tasks.TEST_FRACTION, seed=seed)
    else:
        train, test = np.arange(len(task.train)), np.arange(len(task.train), len(examples))
    if train_examples is not None:
        _check_train_examples(train_examples, task, available=len(train))
        if train_examples < len(train):
            others = 1 - train_examples / len(train)
            chosen, _ = tasks.split_rows(task.train.select(train), fraction=others, seed=seed)
            train = train[chosen]

    def labels(rows: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(groups, rows))

    known = task.train.select(train)
    repeats = 1 if len(known.labels) >= _FEW_LABELS else _REPEATS
    choices = [
        tasks.split_rows(known, fraction=_VALIDATION_FRACTION, seed=seed + 1_000 * number) for number in range(repeats)
    ]
    return Split(labels(train), labels(test), [(labels(train[fit]), labels(train[valid])) for fit, valid in choices])


def _check_train_examples(count: int, task: Task, *, available: int) -> None:
    """Raises UserError unless `count` of the available examples can be fitted and choose a layer."""
    flag = f"--train_examples={count}"
    if count > available:
        raise UserError(f"{flag}: the task has {available:,} training examples; give at most as many")
    # Of every class one to fit and one to choose the layer; two numbers to choose it by their correlation; a handful of
    # sentences.
    least = 5 if task.train.words is not None else 10 if task.is_regression else 2 * len(task.classes)
    if count < least:
        raise UserError(f"{flag}: is too few for this task; give at least {least}")


def _random_weights(loaded: LoadedModel, seed: int) -> LoadedModel:
    """Returns the same model before any training."""
    return dataclasses.replace(loaded, params=jax.device_get(random_params(loaded.encoder, seed)))


def _sparse_features(examples: Examples, keep_mask: np.ndarray) -> Callable[[np.ndarray], Any]:
    """Returns a function of `rows`: the features of all labels, fitted to the texts of these rows only."""
    if examples.words is not None:
        dicts = [
            {"word": words[i].lower(), "before": (words[i - 1] if i else "").lower(), "end": words[i][-3:].lower()}
            | {"after": (words[i + 1] if i + 1 < len(words) else "").lower()}
            for words in examples.words
            for i in range(len(words))
        ]
        dicts = [entry for entry, is_kept in zip(dicts, keep_mask, strict=True) if is_kept]
        return lambda rows: DictVectorizer().fit([dicts[row] for row in rows]).transform(dicts)

    def of_texts(rows: np.ndarray) -> Any:
        columns = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
        parts = []
        for texts in columns:
            # Without a limit on characters, so that texts of signs only, or in scripts without blanks, have features.
            # In large sets a word that occurs in one text only costs time and predicts nothing.
            min_df = 2 if len(rows) > 1000 else 1
            vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]", min_df=min_df)
            parts.append(vectorizer.fit([texts[row] for row in rows]).transform(texts))
        return scipy.sparse.hstack(parts, format="csr")

    return of_texts


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Scores features of N labels on splits of them.

    For words, the scores also have "unseen_accuracy": the accuracy on test words that are not among the training words.
    """

    labels: np.ndarray
    metrics: Sequence[str]
    is_regression: bool
    words: np.ndarray | None = None

    def layers(self, name: str, features_of_seeds: Any, splits: Sequence[Split]) -> Row:
        """Returns the table row of features float32 [S, N, D] per seed; of equally good layers, the last is used."""
        layers, scores = [], []
        for split, features in zip(splits, features_of_seeds, strict=True):
            of_layers = [
                np.mean([self._validation_score(state, fit, valid) for fit, valid in split.choices])
                for state in features
            ]
            layers.append(int(np.flatnonzero(of_layers == np.max(of_layers))[-1]))
            train, test, state = split.train, split.test, features[layers[-1]]
            scaler = StandardScaler().fit(state[train])
            model = self._fit(scaler.transform(state[train]), self.labels[train], strengths=_STRENGTHS)
            scores.append(self._scores(train, test, model.predict(scaler.transform(state[test]))))
        return self._row(name, scores, layers)

    def sparse(self, name: str, features: Callable[[np.ndarray], Any], splits: Sequence[Split]) -> Row:
        """Returns the table row of sparse features, given as a function of the labels to train on."""
        scores = []
        for split in splits:
            matrix = features(split.train)
            model = self._fit(matrix[split.train], self.labels[split.train], strengths=_SPARSE_STRENGTHS)
            scores.append(self._scores(split.train, split.test, model.predict(matrix[split.test])))
        return self._row(name, scores)

    def constant(self, name: str, splits: Sequence[Split]) -> Row:
        """Returns the table row of predicting the most frequent label, or the mean."""
        scores = []
        for split in splits:
            known = self.labels[split.train]
            classes, counts = np.unique(known, return_counts=True)
            value = known.mean() if self.is_regression else classes[np.argmax(counts)]
            scores.append(self._scores(split.train, split.test, np.full(len(split.test), value)))
        return self._row(name, scores)

    def _validation_score(self, state: np.ndarray, fit: np.ndarray, valid: np.ndarray) -> float:
        scaler = StandardScaler().fit(state[fit])
        model = self._fit(scaler.transform(state[fit]), self.labels[fit], strengths=[_LAYER_CHOICE_STRENGTH])
        return METRICS[self.metrics[0]](self.labels[valid], model.predict(scaler.transform(state[valid])))

    def _fit(self, features: Any, labels: np.ndarray, *, strengths: Sequence[float]) -> Any:
        """Returns a fitted classifier or regression.

        Cross-validation compares the strengths of a classifier, if there are several; of a regression, always those of
        `_RIDGE_STRENGTHS`.
        """
        is_sparse = scipy.sparse.issparse(features)
        if self.is_regression and is_sparse:
            folds = KFold(_FOLDS, shuffle=True, random_state=0)
            return RidgeCV([1e-3 * strength for strength in _RIDGE_STRENGTHS], cv=folds).fit(features, labels)
        if self.is_regression:
            return RidgeCV(_RIDGE_STRENGTHS).fit(features, labels)
        # The tolerance applies to the gradient, which is small from the start with rare words and many classes.
        model = LogisticRegression(C=strengths[0], max_iter=300, tol=1e-4 if is_sparse else 1e-3)
        # Fits of this size are several times slower with several threads, more so beside other programs.
        with warnings.catch_warnings(), threadpool_limits(1):
            # Classes with fewer examples than folds, and fits that have not converged fully, are usual.
            warnings.simplefilter("ignore")
            if len(np.unique(labels)) < 2:  # The few training sentences may have only one tag.
                return DummyClassifier(strategy="most_frequent").fit(features, labels)
            if len(strengths) == 1:
                return model.fit(features, labels)
            folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
            if np.unique(labels, return_counts=True)[1].max() < _FOLDS:
                folds = KFold(_FOLDS, shuffle=True, random_state=0)
            return GridSearchCV(model, {"C": list(strengths)}, cv=folds, scoring="accuracy").fit(features, labels)

    def _scores(self, train: np.ndarray, test: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        scores = {name: METRICS[name](self.labels[test], predicted) for name in self.metrics}
        if self.words is not None:
            unseen = ~np.isin(self.words[test], self.words[train])
            if unseen.any():
                scores["unseen_accuracy"] = METRICS["accuracy"](self.labels[test][unseen], predicted[unseen])
        return scores

    def _row(self, name: str, scores: Sequence[Mapping[str, float]], layers: Sequence[int] = ()) -> Row:
        names = [metric for metric in scores[0] if all(metric in of_seed for of_seed in scores)]
        return Row(name, {metric: [of_seed[metric] for of_seed in scores] for metric in names}, layers)


def format_result(result: ProbeResult) -> str:
    """Returns the table as lines for a terminal: mean ± standard deviation, in percent."""
    what = f"{result.classes} classes" if result.classes else "regression"
    lines = [f"{result.task}: {what}, {result.train:,} training labels, {result.test:,} held out"]
    if result.num_truncated:
        lines[0] += f"; {result.num_truncated:,} texts cut to {result.max_length} tokens"
    names = list(result.rows[0].scores)
    width = max(len(row.name) for row in result.rows)
    lines.append(f"{'':{width}}" + "".join(f"{name:>17}" for name in names) + "   layer")
    for row in result.rows:
        cells = "".join(f"{100 * row.mean(name):10.1f} ± {100 * row.spread(name):4.1f}" for name in names)
        layers = ", ".join(map(str, sorted(set(row.layers))))
        lines.append(f"{row.name:{width}}{cells}   {layers}".rstrip())
    return "\n".join(lines)


def as_json(result: ProbeResult) -> dict[str, Any]:
    """Returns the result with the scores of all seeds and their mean and spread."""
    fields = dataclasses.asdict(result)
    for fields_of_row, row in zip(fields["rows"], result.rows, strict=True):
        fields_of_row["mean"] = {metric: row.mean(metric) for metric in row.scores}
        fields_of_row["spread"] = {metric: row.spread(metric) for metric in row.scores}
    return fields
