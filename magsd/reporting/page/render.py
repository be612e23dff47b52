"""The page and the model card from a report's numbers, by Jinja templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from magsd import __version__
from magsd.reporting.bootstrap import Interval
from magsd.reporting.decisions import ThresholdMeasures
from magsd.reporting.estimates import Comparison
from magsd.reporting.measures import OVERALL, PER_CLASS, most_confused
from magsd.reporting.page import words
from magsd.reporting.page.audit import view_audit
from magsd.reporting.page.card import metadata, without_folders
from magsd.reporting.page.charts import shorten
from magsd.reporting.page.contents import Contents, ModelReport
from magsd.reporting.page.curves import BAND_RESAMPLES
from magsd.reporting.page.figures import figures_of
from magsd.reporting.page.pictures import Pictures
from magsd.reporting.predictions import SPLITS
from magsd.reporting.rules import Rule

_TEMPLATES = Path(__file__).parent / "templates"
# Rows of the page's tables of classes, of many classes.
_MOST_ROWS = 30
_SECTIONS = {
    "data": "Data",
    "results": "Results",
    "curves": "Curves",
    "operating": "Operating points",
    "calibration": "Calibration",
    "subgroups": "Subgroups",
    "patients": "Patients",
    "comparison": "Comparison",
    "pictures": "Images",
    "audit": "Audit",
    "limits": "Limits",
}
_PAIRS = 20
_GROUP_MEASURES = ("accuracy", "balanced_accuracy", "specificity", "auroc")


def page(contents: Contents, pictures: Pictures) -> str:
    """The text of report.html."""
    names = words.listed([model.name for model in contents.models])
    environment = _environment(autoescape=True)
    return environment.get_template("report.html").render(
        **_shared(contents),
        title=f"{names}: report on {words.images(contents)}",
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        sections=[
            (key, name)
            for key, name in _SECTIONS.items()
            if key != "comparison" or contents.comparisons or _refined(contents)
        ],
        columns=[
            (model.name, kind if len(model.estimates) > 1 else "", estimates)
            for model in contents.models
            for kind, estimates in model.estimates.items()
        ],
        marks=marks,
        group_measures=_GROUP_MEASURES,
        groups_shown=lambda groups: [
            group.estimates.overall[key] for group in groups for key in _GROUP_MEASURES
        ],
        band_resamples=min(contents.options.resampling.resamples, BAND_RESAMPLES),
        refined=_refined(contents),
        refinements=[
            _titled(each.refinement, f"{each.name}: refined minus raw predictions")
            for each in contents.models
            if each.refinement is not None
        ],
        figures={model.name: figures_of(contents, model) for model in contents.models},
        shown=_shown,
        confused=_confused,
        drawn_note=_drawn_note,
        rule_words=rule_words,
        pictures=pictures,
        audit=None if contents.audit is None else view_audit(contents.audit),
        level=words.level(contents),
        unit="patients" if contents.options.resampling.cluster == "patient" else "images",
        comparisons=[
            _titled(each, f"{each.first} minus {each.second}") for each in contents.comparisons
        ],
    )


def card(contents: Contents) -> str:
    """The text of README.md: a model card of the first model, for the Hugging Face hub."""
    environment = _environment(autoescape=False)
    model = contents.models[0]
    shared = _shared(contents)
    shared["limits"] = [without_folders(contents, line) for line in shared["limits"]]
    body = environment.get_template("card.md").render(
        **shared,
        facts=[(label, without_folders(contents, text)) for label, text in model.facts.rows],
        model=model,
        name=model.name,
        counts=lambda name: [
            "{} ({})".format(*own.get(name, (0, 0))) for own in _by_side(model).values()
        ],
    )
    front = yaml.safe_dump(metadata(contents), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.rstrip()}\n"


def _shared(contents: Contents) -> dict[str, Any]:
    model = contents.models[0]
    return {
        "c": contents,
        "version": __version__,
        "images": words.images(contents),
        "summary": words.summary(contents),
        "limits": words.limits(contents),
        "selected": words.SELECTED,
        "method": words.method(contents),
        "overall": OVERALL,
        "per_class": PER_CLASS,
        "sides": list(_by_side(model)),
        "side_names": [side if model.table.split_known else "images" for side in _by_side(model)],
        "patients_named": words.has_patients(model),
    }


def _by_side(model: ModelReport) -> dict[str, dict[str, tuple[int, int]]]:
    return {side: model.sides[side] for side in SPLITS if side in model.sides}


def _estimate(interval: Interval) -> str:
    limits = words.span(interval)
    return words.number(interval.value) + (f" ({limits})" if limits else "")


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=not autoescape,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=words.number,
        span=words.span,
        estimate=_estimate,
        p_value=words.p_value,
        shorten=lambda name: shorten(name, 24),
        most=lambda names: list(names)[:_MOST_ROWS],
        yaml=lambda values: yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        md=markdown,
    )
    return environment


def markdown(text: str | Sequence[str]) -> str:
    """Text as Markdown shows it letter by letter, on one line."""
    joined = text if isinstance(text, str) else " ".join(text)
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", re.sub(r"\s+", " ", joined))


def rule_words(rule: Rule) -> str:
    """What a rule asks for."""
    if rule.name in ("sensitivity", "specificity"):
        return f"a {rule.name} of at least {rule.value:g} on the images it is fitted on"
    return {
        "argmax": "the likeliest class",
        "youden": "the highest sensitivity + specificity (Youden's index)",
        "cost": f"the lowest cost where a missed image costs {rule.value or 1:g} false alarms",
    }[rule.name]


def _refined(contents: Contents) -> bool:
    return any(model.kind == "refined" for model in contents.models)


def marks(value: object) -> str:
    """What the marks of a table's intervals mean, for those that it has."""
    found = list(_intervals(value))
    text = ""
    if any(interval.undefined for interval in found):
        text += " \u2020 Undefined in some resamples, which the interval leaves out."
    if any(interval.exact for interval in found):
        text += " \u2021 0 or 1 in every resample: exact interval of Clopper and Pearson,"
        text += " counting patients."
    if any(interval.turned for interval in found):
        text += (
            " \u00a7 Reversed percentiles, not BCa: chance makes calibration errors too high, and"
        )
        text += " the interval, which undoes part of that, may leave out the value."
    return text


def _intervals(value: object) -> Iterator[Interval]:
    if isinstance(value, Interval):
        yield value
    elif isinstance(value, dict):
        yield from _intervals(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _intervals(each)
    elif isinstance(value, ThresholdMeasures):
        yield from (value.sensitivity, value.specificity, value.ppv, value.npv)


def _shown(model: ModelReport) -> list[str]:
    """Classes of the page's tables: all, of many those of the lowest AUROC."""
    names = list(model.main.per_class)
    if len(names) <= _MOST_ROWS:
        return names
    aurocs = [model.main.per_class[name]["auroc"].value for name in names]
    order = np.argsort(np.nan_to_num(aurocs, nan=np.inf), kind="stable")
    return [names[k] for k in order[:_MOST_ROWS]]


def _confused(model: ModelReport) -> list[tuple[str, str, int, int]]:
    """The most confused pairs of classes: true, predicted, images, images of the true class."""
    names, images = list(model.main.class_images), model.main.class_images
    pairs = most_confused(model.main.confusion, _PAIRS)
    return [(names[i], names[j], count, images[names[i]]) for i, j, count, _ in pairs]


def _drawn_note(model: ModelReport) -> str:
    drawn, names = len(model.drawn), len(model.main.per_class)
    return "" if drawn == names else f" ({drawn} of {names} classes, of the lowest AUROC)"


def _titled(comparison: Comparison, title: str) -> dict[str, Any]:
    aurocs = [each for each in comparison.auroc.items() if np.isfinite(each[1].difference)]
    return {
        "comparison": comparison,
        "title": title,
        "aurocs": aurocs[:_MOST_ROWS],
        "clustered": any(each.clustered for _, each in aurocs),
    }
