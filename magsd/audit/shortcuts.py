"""How well the class can be told from files, brightness, margins, the border, table columns.

Cross-validated by patient, the area under the ROC curve of each class against the rest: 0.5 says
nothing, 1 everything. The mean over classes counts, and so does the highest class: of many classes
one that is told perfectly hardly moves the mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from magsd.audit.headers import Facts

#: Feature -> the group in which it is looked at together with others.
GROUPS: dict[str, tuple[str, ...]] = {
    "size": ("width", "height", "aspect"),
    "file": ("format", "bits", "colors", "color", "quality", "bytes per pixel"),
    "brightness": ("mean", "deviation", "black", "white"),
    "margins and markers": (
        *("margin left", "margin right", "margin top", "margin bottom"),
        *("markers", "marker area"),
    ),
}
COLUMNS = "columns of the table"
BORDER = "image border"
ALL = "all of these together"
#: From these areas on a feature says a little, and is warned of.
LITTLE, WARNING = 0.6, 0.7
_MOST_IMAGES, _FOLDS, _FEWEST_PATIENTS = 4000, 5, 10
_PERMUTATIONS, _TREES = 3, 50
_MOST_WORDS = 20

Verdict = Literal["says nothing", "says a little", "too few images to say", "warning"]
#: What a row may say, the gravest last.
VERDICTS: tuple[Verdict, ...] = (
    *("says nothing", "too few images to say"),
    *("says a little", "warning"),
)
_Parts = list[tuple[NDArray[np.intp], NDArray[np.intp]]]


@dataclass(frozen=True)
class Shortcut:
    """How well a set of features alone tells the class.

    name: of a group, or of one feature of it. auroc, deviation: mean and sample standard deviation
    over the folds, of the mean over classes. per_class, class_deviations: the same of each class
    against the rest. permuted: the mean where labels were shuffled, NaN where that was not done.
    """

    name: str
    group: str
    auroc: float
    deviation: float
    per_class: dict[str, float]
    permuted: float
    folds: int
    class_deviations: dict[str, float] = field(default_factory=dict)

    @property
    def highest_class(self) -> str:
        """The class with the highest area; empty where no class was measured."""
        return max(self.per_class, key=lambda name: self.per_class[name], default="")

    @property
    def verdict(self) -> Verdict:
        """In plain words, the graver of what the mean and the highest class say.

        A warning only where the folds agree that it is no chance. The highest class was picked
        from all of them, so it needs more than the two standard errors of the mean.
        """
        of_mean = _verdict(self.auroc, self.deviation, self.folds, 2.0)
        if not (highest := self.highest_class):
            return of_mean
        errors = _standard_errors(self.folds, len(self.per_class))
        deviation = self.class_deviations[highest]
        of_class = _verdict(self.per_class[highest], deviation, self.folds, errors)
        return max(of_mean, of_class, key=VERDICTS.index)


def _verdict(auroc: float, deviation: float, folds: int, errors: float) -> Verdict:
    if auroc < LITTLE:
        return "says nothing"
    if auroc - errors * deviation / math.sqrt(folds) <= 0.5:
        return "too few images to say"
    return "warning" if auroc >= WARNING else "says a little"


def _standard_errors(folds: int, classes: int) -> float:
    """Of the best of several classes: Student's t at 5 % in all, two-sided, by Bonferroni."""
    from scipy.stats import t

    return float(t.ppf(1 - 0.025 / classes, max(1, folds - 1)))


@dataclass(frozen=True)
class ShortcutReport:
    """rows: groups, each followed by its features. images: that were looked at.

    note: why some or all were not. left_out: classes with too few patients. blanked: what of the
    image was left out where its border was looked at, in words.
    """

    rows: list[Shortcut]
    images: int
    folds: int
    left_out: list[str]
    blanked: str
    note: str


def find_shortcuts(
    facts: Sequence[Facts],
    border: NDArray[np.uint8],
    labels: Sequence[str],
    patients: Sequence[str],
    *,
    blanked: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShortcutReport:
    """Measure every feature, every group, all of them, the border, and columns of the table.

    facts: of each image. border: (N, P) pixels that are left of each image. Classes of fewer than
    ten patients are left out; of many images some 4,000 are taken, as many of each class.
    """
    chosen, left_out = _chosen(labels, patients, seed)
    y = np.array([labels[i] for i in chosen])
    classes = sorted(set(y))
    if len(classes) < 2:
        note = f"not enough images: two classes of {_FEWEST_PATIENTS} patients each are needed"
        return ShortcutReport([], 0, 0, left_out, blanked, note)
    groups = np.array([patients[i] for i in chosen])
    trial = _Trial(y, classes, _folds(y, groups, seed), seed)
    columns = feature_columns([facts[i] for i in chosen])
    tasks = _tasks(columns, border[chosen].astype(np.float32))
    rows = []
    for number, (name, group, matrix) in enumerate(tasks, 1):
        rows.append(trial.run(name, group, matrix, permuted=name in (ALL, BORDER)))
        progress(number, len(tasks))
    note = "" if len(chosen) == len(labels) else f"{len(chosen)} of {len(labels)} images"
    return ShortcutReport(rows, len(chosen), len(trial.parts), left_out, blanked, note)


@dataclass(frozen=True)
class _Trial:
    labels: NDArray[Any]
    classes: list[str]
    parts: _Parts
    seed: int

    def run(
        self, name: str, group: str, matrix: NDArray[Any], *, permuted: bool = False
    ) -> Shortcut:
        """Cross-validate one set of features (N, F)."""
        scores = self._scores(matrix, self.labels)
        random = np.random.default_rng(self.seed)
        chance = [
            float(self._scores(matrix, random.permutation(self.labels)).mean())
            for _ in range(_PERMUTATIONS if permuted else 0)
        ]
        by_fold = scores.mean(axis=1)
        spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])
        return Shortcut(
            name,
            group,
            float(by_fold.mean()),
            float(by_fold.std(ddof=1)) if len(by_fold) > 1 else 0.0,
            dict(zip(self.classes, scores.mean(axis=0).tolist(), strict=True)),
            float(np.mean(chance)) if chance else math.nan,
            len(self.parts),
            dict(zip(self.classes, spread.tolist(), strict=True)),
        )

    def _scores(self, matrix: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
        """(folds, classes) areas, each class against the rest; 0.5 where a fold lacks one."""
        from sklearn.metrics import roc_auc_score

        scores = np.full((len(self.parts), len(self.classes)), 0.5)
        if np.all(matrix == matrix[:1]):
            return scores
        for k, (train, test) in enumerate(self.parts):
            model = _model(matrix.shape[1], len(train), self.seed)
            found = model.fit(matrix[train], labels[train]).predict_proba(matrix[test])
            for j, name in enumerate(self.classes):
                own = labels[test] == name
                if name in model.classes_ and own.any() and not own.all():
                    column = list(model.classes_).index(name)
                    scores[k, j] = roc_auc_score(own, found[:, column])
        return scores


def _model(features: int, images: int, seed: int) -> Any:
    """A tree for one feature; 50 extremely randomized ones for several."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.tree import DecisionTreeClassifier

    settings = {"class_weight": "balanced", "random_state": seed}
    if features == 1:
        return DecisionTreeClassifier(min_samples_leaf=max(5, images // 50), **settings)
    return ExtraTreesClassifier(_TREES, min_samples_leaf=5, **settings)


def _chosen(
    labels: Sequence[str], patients: Sequence[str], seed: int
) -> tuple[NDArray[np.intp], list[str]]:
    """Positions of the images that are looked at, and the classes with too few patients."""
    who: dict[str, set[str]] = {}
    for label, patient in zip(labels, patients, strict=True):
        who.setdefault(label, set()).add(patient)
    left_out = sorted(label for label, found in who.items() if len(found) < _FEWEST_PATIENTS)
    quota = max(50, _MOST_IMAGES // max(1, len(who) - len(left_out)))
    kept: list[int] = []
    taken: Counter[str] = Counter()
    for position in np.random.default_rng(seed).permutation(len(labels)).tolist():
        label = labels[position]
        if label not in left_out and taken[label] < quota:
            taken[label] += 1
            kept.append(position)
    return np.array(sorted(kept), np.intp), left_out


def _folds(labels: NDArray[Any], patients: NDArray[Any], seed: int) -> _Parts:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels, patients))


def feature_columns(facts: Sequence[Facts]) -> dict[str, NDArray[np.float64]]:
    """Feature -> (N, 1) numbers, or (N, W) with a column for each of its words.

    Columns of the table's that are text are taken up to twenty words: others are names.
    """
    names = dict.fromkeys(name for fact in facts for name in fact)
    columns = {}
    for name in names:
        values = [fact.get(name, math.nan) for fact in facts]
        numbers = [_number(value) for value in values]
        if any(number is None for number in numbers):
            words = sorted({str(value) for value in values})
            if len(words) > _MOST_WORDS:
                continue
            columns[name] = np.array([[str(v) == w for w in words] for v in values], np.float64)
        else:
            column = np.array(numbers, np.float64)
            known = column[np.isfinite(column)]
            lowest = known.min() - 1 if len(known) else 0.0
            columns[name] = np.where(np.isfinite(column), column, lowest)[:, None]
    return columns


def _number(value: float | str) -> float | None:
    """The number that a value is, NaN for an empty one, None for a word."""
    if isinstance(value, str) and not value.strip():
        return math.nan
    try:
        return float(value)
    except ValueError:
        return None


def _tasks(
    columns: dict[str, NDArray[np.float64]], border: NDArray[np.float32]
) -> list[tuple[str, str, NDArray[Any]]]:
    """Name, group and features (N, F) of what is measured; a group stands before its features.

    All together are without the columns of the table: one of them may be the label itself.
    """
    used = {group: [name for name in names if name in columns] for group, names in GROUPS.items()}
    tasks = [task for group, names in used.items() for task in _group_tasks(group, names, columns)]
    if together := [columns[name] for names in used.values() for name in names]:
        tasks.append((ALL, ALL, np.hstack(together)))
    if border.shape[1]:
        tasks.append((BORDER, BORDER, border))
    return tasks + _group_tasks(COLUMNS, [n for n in columns if n.startswith("column ")], columns)


def _group_tasks(
    group: str, names: Sequence[str], columns: dict[str, NDArray[np.float64]]
) -> list[tuple[str, str, NDArray[Any]]]:
    tasks: list[tuple[str, str, NDArray[Any]]] = []
    if len(names) > 1:
        tasks.append((group, group, np.hstack([columns[name] for name in names])))
    return tasks + [(name, group, columns[name]) for name in names]
