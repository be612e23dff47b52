"""A cross-validation's results as tables (terminal, CSV, Markdown, LaTeX) and as a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from magsd.console import say
from magsd.crossval.plot import plot_scores
from magsd.crossval.results import LOGITS, METRICS, Outcome
from magsd.crossval.summary import ModelSummary, Summary
from magsd.evaluation.tables import HEADINGS

_LOGITS_NAMES = {"raw": "raw", "refined": "raw + refined"}
_HEADER = ["model", "logits", "runs", *(HEADINGS[name] for name in METRICS)]
_TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        "±": r"$\pm$",
    }
)


def write_summary(out: Path, summary: Summary) -> None:
    """Write summary.csv, summary.md, summary.tex (booktabs) and scores.png into a folder."""
    _write_csv(out / "summary.csv", _SUMMARY_COLUMNS, _summary_rows(summary))
    _write(out / "summary.md", _markdown(summary))
    _write(out / "summary.tex", _latex(summary))
    if any(model.finished for model in summary.models):
        plot_scores(out / "scores.png", summary)
    else:
        (out / "scores.png").unlink(missing_ok=True)


def write_results(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One line a run: its metrics as shares, or why it has none."""
    scores = [(kind, metric) for kind in LOGITS for metric in METRICS]
    columns = ["model", "seed", "fold", "state", "side", "images"]
    columns += ["train_images", "validation_images"]
    columns += [metric if kind == "raw" else f"{kind}_{metric}" for kind, metric in scores]
    rows = []
    for outcome in outcomes:
        run, result = outcome.run, outcome.result
        place = [run.model, run.seed, run.fold]
        if result is None:
            rows.append([*place, "failed", *[""] * (4 + len(scores)), outcome.reason])
            continue
        values = [result.scores.get(kind, {}).get(metric, math.nan) for kind, metric in scores]
        counts = [len(result.measured), result.train_images, result.validation_images]
        rows.append([*place, "finished", result.side, *counts, *map(_cell, values), ""])
    _write_csv(path, [*columns, "reason"], rows)


def summary_table(summary: Summary) -> Table:
    """Rows are models, by kind of logits; columns are metrics, in per cent."""
    table = Table(title="Cross-validation", title_justify="left", title_style="bold")
    for k, name in enumerate(_HEADER):
        table.add_column(
            name, justify="left" if k < 2 else "right", no_wrap=k >= 2, overflow="fold"
        )
    for model in summary.models:
        for row in _rows(model, summary):
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def print_report(console: Console, outcomes: Sequence[Outcome], summary: Summary) -> None:
    """The table, what it says, and the runs that are missing from it."""
    console.print(summary_table(summary))
    console.print(Text(caption(summary)), highlight=False)
    missing = [outcome for outcome in outcomes if outcome.result is None]
    if missing:
        say(console, "are missing:", first=f"{len(missing)} of {len(outcomes)} runs", style="red")
    for outcome in missing:
        say(console, f"  {outcome.run.title}: {outcome.reason}")


def caption(summary: Summary) -> str:
    """What the numbers are."""
    text = "Per cent: mean ± sample standard deviation over the runs, macro means over classes."
    text += (
        " Selected on these images: each epoch is the best one on the fold that is measured on."
        if summary.selected
        else " Nothing was selected on the folds that are measured on."
    )
    if len(summary.models) > 1:
        text += (
            f" p: corrected resampled t-test (Nadeau and Bengio, 2003), two-sided, against "
            f"{summary.baseline} over the runs n that both finished, for each metric by itself"
        )
        text += "." if math.isnan(summary.ratio) else f"; n_test/n_train = {summary.ratio:.3f}."
    missing = sum(model.planned - model.finished for model in summary.models)
    if missing:
        text += f" Runs missing: {missing}."
    return text


def _rows(model: ModelSummary, summary: Summary) -> list[list[str]]:
    """The model's rows of the table: means, and p below them where it is tested."""
    runs = f"{model.finished}/{model.planned}"
    kinds = [kind for kind in LOGITS if (kind, METRICS[0]) in model.scores]
    if not kinds:
        return [[model.model, "-", runs, *["-"] * len(METRICS)]]
    rows = []
    for kind in kinds:
        scores = [model.scores[kind, metric] for metric in METRICS]
        cells = [_mean_and_deviation(score.mean, score.deviation) for score in scores]
        rows.append([model.model, _LOGITS_NAMES[kind], runs, *cells])
        tests = [score.test for score in scores if score.test is not None]
        if tests:
            pairs = max(test.pairs for test in tests)
            ps = [_p_value(test.p) for test in tests]
            rows.append(["", f"p, against {summary.baseline}", f"n = {pairs}", *ps])
    return rows


def _mean_and_deviation(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    text = f"{100 * mean:.1f}"
    return text if math.isnan(deviation) else f"{text} ± {100 * deviation:.1f}"


def _p_value(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


_SUMMARY_COLUMNS = [
    *("model", "logits", "metric", "n", "planned", "mean", "standard_deviation"),
    *("baseline", "pairs", "difference", "t", "p"),
]


def _summary_rows(summary: Summary) -> list[list[str]]:
    rows = []
    for model in summary.models:
        for (kind, metric), score in model.scores.items():
            row = [model.model, kind, metric, str(score.n), str(model.planned)]
            row += [_cell(score.mean), _cell(score.deviation)]
            test = score.test
            if test is None:
                row += [""] * 5
            else:
                row += [summary.baseline, str(test.pairs)]
                row += [_cell(value) for value in (test.difference, test.t, test.p)]
            rows.append(row)
    return rows


def _markdown(summary: Summary) -> str:
    rows = [_HEADER, ["---", "---", *["---:"] * (len(_HEADER) - 2)]]
    rows += [row for model in summary.models for row in _rows(model, summary)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([*lines, "", caption(summary), ""])


def _latex(summary: Summary) -> str:
    def line(row: Sequence[str]) -> str:
        return " & ".join(cell.translate(_TEX) for cell in row) + r" \\"

    lines = [
        "% Needs the package booktabs.",
        r"\begin{tabular}{ll" + "r" * (len(_HEADER) - 2) + "}",
    ]
    lines += [r"\toprule", line(_HEADER)]
    for model in summary.models:
        lines += [r"\midrule", *(line(row) for row in _rows(model, summary))]
    lines += [r"\bottomrule", r"\end{tabular}", "", f"% {caption(summary)}", ""]
    return "\n".join(lines)


def _cell(value: float) -> str:
    """A number with all its digits, empty where undefined."""
    return "" if math.isnan(value) else repr(value)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
