"""A linear classifier of quality: hashed words and pairs of words into a logistic regression.

Llama 3 (2024, section 3.1.1) keeps what fastText, a linear classifier of hashed n-grams (Joulin et al. 2017), and a
DistilRoberta take for good. This is the fastText end of that, on scikit-learn. The labels are the user's; without any,
`labels_of_library` makes weak ones. On the disk it is classifier.json and weights.safetensors. F features.
"""

import hashlib
import json
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moe_lm.config import ConfigError, require
from moe_lm.data.sources import content_key, is_held_out
from moe_lm.data.stdlib import is_table, read_module, stdlib_root
from moe_lm.data.tokenizer import write_text

FEATURES = 2**18
TOKENS = r"\w+|[^\w\s]"
CHARACTERS = 20_000
"""Characters of a document that are looked at: more hardly change its score."""
HELD_OUT = 0.2
"""Share of the labelled documents that the classifier is measured on and not trained on."""
BATCH = 64
ITERATIONS = 1000


@dataclass(frozen=True)
class Facts:
    """What classifier.json says."""

    kind: str
    """`prose`, `code` or `any`: the documents that it was made for; it leaves others alone."""
    labels: str
    """Where the labels come from."""
    features: int
    trained_on: tuple[int, int]
    """Bad and good documents."""
    held_out: tuple[int, int]
    """Bad and good documents that it was measured on."""
    accuracy: float
    """Share of the held-out documents on the right side of 0.5."""
    auc: float
    """Chance that a held-out good document scores above a held-out bad one."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier; `load_classifier` reads one."""

    facts: Facts
    weights: np.ndarray
    """(F,) float32."""
    bias: float

    @cached_property
    def vectorizer(self) -> Any:
        return make_vectorizer(self.facts.features)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """(texts,) float64: the probability that each text is good. A text scores the same in any company."""
        if not texts:
            return np.zeros(0)
        logits = self.vectorizer.transform([text[:CHARACTERS] for text in texts]) @ self.weights.astype(np.float64)
        return 1 / (1 + np.exp(-(logits + self.bias)))

    def judges(self, kind: str) -> bool:
        return self.facts.kind in ("any", kind)

    def identity(self) -> list[Any]:
        digest = hashlib.blake2b(self.weights.tobytes(), digest_size=16).hexdigest()
        return [asdict(self.facts), digest, self.bias, sklearn().__version__]


def sklearn() -> ModuleType:
    """The library, which costs a second to import. Raises ConfigError where it is missing."""
    try:
        import sklearn
        import sklearn.feature_extraction.text
        import sklearn.linear_model
        import sklearn.metrics
    except ImportError:
        raise ConfigError(
            "the quality classifier needs the scikit-learn library: pip install 'moe-lm[quality]', or leave "
            "data.quality.classifier out."
        ) from None
    return sklearn


def make_vectorizer(features: int) -> Any:
    """Counts of hashed tokens and pairs of tokens, as rows of length 1."""
    return sklearn().feature_extraction.text.HashingVectorizer(
        token_pattern=TOKENS, ngram_range=(1, 2), n_features=features, alternate_sign=False, norm="l2"
    )


def train_classifier(texts: Sequence[str], labels: Sequence[int], kind: str, origin: str) -> Classifier:
    """A classifier of `texts`, label 1 for good and 0 for bad, trained on 80% of them and measured on the others.

    Which ones those are depends on their text alone, so copies stay together. Raises ConfigError where either side has
    not both labels.
    """
    library = sklearn()
    rows = make_vectorizer(FEATURES).transform([text[:CHARACTERS] for text in texts])
    truth = np.array(labels, np.int64)
    tested = np.array([is_held_out(content_key(text), HELD_OUT) for text in texts], bool)
    counts = [np.bincount(truth[side], minlength=2) for side in (~tested, tested)]
    require(
        min(map(min, counts)) > 0,
        f"the labels are {(truth == 1).sum()} good and {(truth == 0).sum()} bad documents, too few to train and "
        "measure on both kinds: label more in --labels.",
    )
    # Held-out accuracy on the weak labels: 0.909 at C = 1, 0.950 at 10, 0.962 at 30, 0.968 at 100.
    regression = library.linear_model.LogisticRegression(C=30.0, class_weight="balanced", max_iter=ITERATIONS)
    regression.fit(rows[~tested], truth[~tested])
    weights, bias = regression.coef_[0].astype(np.float32), float(np.float32(regression.intercept_[0]))
    logits = rows[tested] @ weights.astype(np.float64) + bias
    facts = Facts(
        kind=kind,
        labels=origin,
        features=FEATURES,
        trained_on=tuple(counts[0].tolist()),
        held_out=tuple(counts[1].tolist()),
        accuracy=float(((logits > 0) == truth[tested]).mean()),
        auc=float(library.metrics.roc_auc_score(truth[tested], logits)),
    )
    return Classifier(facts, weights, bias)


def save_classifier(classifier: Classifier, directory: Path) -> None:
    """Write classifier.json and weights.safetensors. Raises ConfigError where the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {"weights": classifier.weights, "bias": np.array([classifier.bias], np.float32)},
            directory / "weights.safetensors",
        )
        write_text(directory / "classifier.json", json.dumps(asdict(classifier.facts), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{directory} cannot be written ({error}): name another directory.") from error


def load_classifier(directory: str | Path) -> Classifier:
    """The classifier that `save_classifier` wrote. Raises ConfigError where there is none, or a damaged one."""
    sklearn()
    folder = Path(directory).expanduser()
    require(
        (folder / "classifier.json").is_file(),
        f"data.quality.classifier = {directory} holds no classifier.json: make one with "
        f"python -m moe_lm.data classifier {directory}.",
    )
    try:
        facts = json.loads((folder / "classifier.json").read_text("utf-8"))
        facts = Facts(**facts | {name: tuple(facts[name]) for name in ("trained_on", "held_out")})
        stored = load_file(folder / "weights.safetensors")
        if stored["weights"].shape != (facts.features,):
            raise ValueError(f"{stored['weights'].shape} weights for {facts.features} features")
        return Classifier(facts, stored["weights"], float(stored["bias"][0]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"the classifier in {directory} is damaged ({error}): make it anew with python -m moe_lm.data classifier."
        ) from error


def read_labels(path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of a JSONL file of {"text": ..., "label": ...}; a label is 1, true or "good", else 0, false or
    "bad". Raises ConfigError, naming the line, for anything else."""
    values = {1: 1, 0: 0, "good": 1, "bad": 0}
    texts, labels = [], []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--labels {path} cannot be read ({reason}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], values[row["label"]]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'line {number} of --labels {path} is not {{"text": TEXT, "label": "good" or "bad" (1 or 0)}}.'
            ) from None
        texts.append(text)
        labels.append(label)
    return texts, labels


def labels_of_library() -> tuple[list[str], list[int]]:
    """Weak labels for code, of the running interpreter's own files: the library's modules are good, and its tests, its
    codecs (stamped from templates) and its tables of data are bad.

    They say where a file stands, not how good it is: a good test is called bad. Raises ConfigError where the
    interpreter came without its tests.
    """
    texts, labels = [], []
    for relative, text, label in files_of_library(stdlib_root()):
        if len(text) >= 200 and "lib2to3/tests/data" not in relative:  # those do not even parse, on purpose
            texts.append(text)
            labels.append(label)
    require(
        labels.count(0) >= 20,
        "this interpreter's standard library comes without its tests, from which weak labels are made: give --labels.",
    )
    return texts, labels


def files_of_library(root: Path) -> Iterator[tuple[str, str, int]]:
    """(path, source, label) of the Python files of the library at `root`, in the order of their paths."""
    bad = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    for directory, children, files in os.walk(root):
        children[:] = sorted(c for c in children if c not in ("site-packages", "dist-packages", "__pycache__"))
        relative = Path(directory).relative_to(root)
        for name in sorted(name for name in files if name.endswith(".py")):
            path, worse = Path(directory, name), not bad.isdisjoint(relative.parts)
            try:
                if worse:  # parsing 800 files of tests would take 10 s
                    with tokenize.open(path) as file:
                        source = file.read()
                else:
                    source, tree = read_module(path)
                    worse = is_table(source, tree)
            except (SyntaxError, ValueError):
                continue
            yield (relative / name).as_posix(), source, int(not worse)
