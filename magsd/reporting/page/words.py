"""What a report says in sentences, each made from its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from magsd.reporting.bootstrap import Interval
from magsd.reporting.delong import AurocDifference
from magsd.reporting.estimates import Estimates
from magsd.reporting.page.contents import Contents, ModelReport

SIDES = {
    "test": "test images, on which nothing was chosen",
    "external": "external images, of another source than the model was developed on",
    "validation": "validation images",
}
UNDEFINED = "\u2013"
SELECTED = "Selected on these images"
#: A class or a set of fewer patients gets a sentence in the limits.
_FEW_IN_CLASS, _FEW = 20, 100
_NAMED = 6


def number(value: float, digits: int = 3) -> str:
    """A number with a true minus, which 0 has not; an en dash where undefined."""
    if value is None or math.isnan(value):
        return UNDEFINED
    # Adding 0 makes -0 0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def span(interval: Interval | AurocDifference, digits: int = 3) -> str:
    """The limits of an interval, or nothing where it says nothing."""
    if math.isnan(interval.low) or math.isnan(interval.high) or interval.low == interval.high:
        return ""
    return f"{number(interval.low, digits)} to {number(interval.high, digits)}"


def p_value(value: float) -> str:
    """A p-value as it is printed."""
    if math.isnan(value):
        return UNDEFINED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def level(contents: Contents) -> str:
    """The level of the intervals, e.g. 95 %."""
    return f"{100 * contents.options.resampling.level:g}\u00a0%"


def method(contents: Contents) -> str:
    """How the intervals are made, for captions."""
    made = contents.options.resampling
    of = "patients" if made.cluster == "patient" else "images"
    how = "BCa" if made.method == "bca" else "percentiles"
    return f"{level(contents)} intervals: {made.resamples:,} bootstrap resamples of {of} ({how})"


def count(number: int, word: str) -> str:
    """A number and its word in the singular or the plural."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def listed(names: list[str]) -> str:
    """Some names between commas, and how many more there are."""
    more = len(names) - _NAMED
    text = ", ".join(names[:_NAMED])
    return f"{text} and {more} more" if more > 0 else text


def has_patients(model: ModelReport) -> bool:
    """Whether the file names patients."""
    return model.table.unnamed < len(model.table)


def images(contents: Contents) -> str:
    """What the reported images are called, in captions."""
    known = all(model.table.split_known for model in contents.models)
    return f"{contents.side} images" if known else "images"


def summary(contents: Contents) -> list[str]:
    """The report in short: a paragraph of sentences."""
    first = contents.models[0].main
    of = f" of {count(first.patients, 'patient')}" if has_patients(contents.models[0]) else ""
    unknown = [model.name for model in contents.models if not model.table.split_known]
    names = [model.name for model in contents.models]
    what = f"the model {names[0]}"
    if len(names) > 1:
        what = f"{len(names)} models ({listed(names)})"
    sentences = [
        f"This report measures {what} on"
        f" {_images(first.images, '' if unknown else contents.side, of)}, in"
        f" {len(contents.classes)} classes."
    ]
    if unknown:
        files = "The file does" if len(names) == 1 else f"The files of {listed(unknown)} do"
        trained = "the model was" if len(unknown) == 1 else "the models were"
        sentences.append(f"{files} not say whether {trained} trained or tuned on them.")
    for model in contents.models:
        sentences.append(_performance(contents, model))
    sentences += [_difference(contents, k) for k in range(len(contents.comparisons))]
    return sentences


def _images(number: int, side: str, of: str) -> str:
    what, comma, rest = SIDES.get(side, "images").partition(",")
    return f"{number:,} {what if number != 1 else what.removesuffix('s')}{of}{comma}{rest}"


def _performance(contents: Contents, model: ModelReport) -> str:
    overall = model.main.overall
    values = [
        f"{label} {number(overall[name].value)}{_brackets(overall[name])}"
        for name, label in (
            ("accuracy", "accuracy"),
            ("balanced_accuracy", "mean sensitivity"),
            ("auroc", "mean AUROC"),
        )
    ]
    recalls = {
        name: each["recall"]
        for name, each in model.main.per_class.items()
        if not math.isnan(each["recall"].value)
    }
    lowest = min(recalls, key=lambda name: recalls[name].value)
    text = f"{model.name}: {', '.join(values)}"
    if len(recalls) > 1:
        text += (
            f"; the class with the lowest sensitivity is {lowest} with"
            f" {number(recalls[lowest].value)}{_brackets(recalls[lowest])}"
        )
    if model is contents.models[0]:
        text += f" (in brackets {level(contents)} intervals)"
    return f"{text}."


def _brackets(interval: Interval) -> str:
    text = span(interval)
    return f" ({text})" if text else ""


def _difference(contents: Contents, k: int) -> str:
    comparison = contents.comparisons[k]
    one = comparison.overall["accuracy"]
    if math.isnan(one.low):
        return f"{comparison.first} and {comparison.second} cannot be told apart here."
    if one.flat and not one.value:
        return f"{comparison.first} and {comparison.second} have the same accuracy."
    text = (
        f"The accuracy of {comparison.first} minus that of {comparison.second} is"
        f" {number(one.value)}{_brackets(one)}"
    )
    if one.low <= 0 <= one.high:
        return f"{text}: the images do not show which of them is better."
    return f"{text}."


def limits(contents: Contents) -> list[str]:
    """What the figures do not show, one sentence or two each."""
    return [*_selection(contents), *_size(contents), *_scope(contents)]


def _selection(contents: Contents) -> Iterator[str]:
    if contents.side == "validation":
        yield (
            f"{SELECTED}: the epoch, the temperature or the thresholds were chosen on the"
            " validation images that are reported here."
            " All figures flatter the models; a test side would not."
        )
    for model in contents.models:
        if model.point is None:
            yield (
                f"{model.name}: there are no validation rows to fit a temperature or thresholds on."
                " The prediction is the likeliest class, and calibration is shown as it is."
            )
        elif "validation rows" in model.fitted and contents.side != "validation":
            yield (
                f"{model.name}: temperature and thresholds were fitted on"
                f" {count(model.point.images, 'validation image')}; on few images they vary much."
            )
        if not model.table.split_known:
            yield (
                f"{model.name}: the file has no column split. If the model was trained or tuned on"
                " these images, all its figures flatter."
            )
        if model.input.folds:
            models = count(len(model.input.folds), "model")
            yield (
                f"{model.name}: the predictions are of {models}, one a fold. The intervals"
                " take them for one model; AUROC ranks the scores of all folds together."
            )
        for warning in model.table.warnings:
            yield f"{model.name}: {warning}."


def _size(contents: Contents) -> Iterator[str]:
    main = contents.models[0].main
    unit = "patient" if has_patients(contents.models[0]) else "image"
    unnamed = contents.models[0].table.unnamed
    if not has_patients(contents.models[0]):
        yield (
            "The file names no patients, so that each image counts as one. If patients have several"
            " images here, the intervals are too narrow."
        )
    elif contents.options.resampling.cluster == "image" and main.patients < main.images:
        yield (
            "Intervals resample images though patients have several: they are too narrow; --by"
            " patient gives those of patients."
        )
    if 0 < unnamed < main.images:
        yield (
            f"{count(unnamed, 'image')} of {main.images:,} are without a named patient; each counts"
            " as one of its own. If patients have several of these, the intervals are too narrow."
        )
    if main.patients < _FEW:
        yield (
            f"There are {count(main.patients, unit)} in all: intervals are wide, and approximate"
            " where fewer than about 20 decide."
        )
    empty = [name for name, images in main.class_images.items() if not images]
    if empty:
        yield (
            f"No image is of class {listed(empty)}: sensitivity, AUROC and average precision of"
            f" {'it' if len(empty) == 1 else 'these'} are undefined, and means leave"
            f" {'it' if len(empty) == 1 else 'them'} out."
        )
    few = [
        f"{name} ({count(patients, unit)})"
        for name, patients in main.class_patients.items()
        if 0 < patients < _FEW_IN_CLASS
    ]
    if few:
        yield f"Few {unit}s of a class, whose figures are uncertain: {listed(few)}."
    undefined = [
        f"{label} in {interval.undefined:,}"
        for label, interval in _intervals(main)
        if interval.undefined
    ]
    if undefined:
        yield (
            f"Some figures are undefined in some of the"
            f" {contents.options.resampling.resamples:,} resamples, which their intervals leave"
            f" out: {listed(undefined)}."
        )


def _intervals(estimates: Estimates) -> Iterator[tuple[str, Interval]]:
    yield from estimates.overall.items()
    for name, measures in estimates.per_class.items():
        for measure, interval in measures.items():
            yield f"{measure} of {name}", interval


def _one_source(contents: Contents) -> bool:
    """Whether runs' configurations say that all sides are of the same source."""
    data = [model.facts.configuration.get("data", {}) for model in contents.models]
    sources = {each.get("source") for each in data}
    same = len(sources) == 1 and None not in sources
    return same and all(each.get("test", "none") in ("folds", "none") for each in data)


def _scope(contents: Contents) -> Iterator[str]:
    if contents.side != "external":
        yield (
            "The reported images are of the source that the models were trained on."
            if _one_source(contents)
            else "Whether the images are of one or of several hospitals is not known to the report."
        ) + (
            " How the models do at another hospital, with other machines or at other frequencies of"
            " the classes, is not measured here."
        )
    yield (
        "The intervals say how figures vary with the patients of the test, not with those of the"
        " training or with the seed; another training run gives other figures."
    )
    small = sum(bool(g.small) for m in contents.models for s in m.subgroups.values() for g in s)
    if small:
        yield f"{count(small, 'subgroup')} marked as small: little can be said of them."
    if contents.comparisons:
        yield (
            "The p-values of the comparison are not corrected for the number of measures and models"
            " that are compared."
        )
    if contents.audit is None:
        yield (
            "The set was not audited for duplicates, for patients on two sides and for image"
            " properties that give the class away: magsd audit SOURCE does that."
        )
    yield "For research only: nothing here is a medical device."
