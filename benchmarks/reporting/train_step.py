"""The report on whole training steps, and their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.steps import BFLOAT16, FLOAT32, OURS, PUBLISHED, SEPARATE
from benchmarks.reporting.results import run_of
from benchmarks.reporting.tables import heading, verdicts
from benchmarks.reporting.targets import Target, Verdict
from benchmarks.reporting.text import memory, ratio, seconds, table

#: The size of the published training, for which the targets hold.
_SIZE = (16, "resnet50", 224)
_NOTES = (
    "Forward passes, backward and optimizer. Times are medians per step. A ratio is the median"
    " of the ratios within single rounds, in which all take their turn; in brackets its"
    ' quartiles. Ours fuses batch norms and passes the views as groups of one batch, "separate"'
    " does neither. The floor is four forward passes of the bare backbone and their backward, in"
    " the same arithmetic and memory format. On a CPU all but the published step keep the memory"
    " that tensors free, as training does; it runs as released, in a process of its own, and once"
    " more beside the others with its memory kept. Memory is parameters, gradients and momentum,"
    " and the peak of one step in torch's allocator over them. Host reads are what makes the host"
    " wait for a GPU: numbers read back and shapes that depend on data."
)
Entries = Sequence[dict[str, Any]]


def render(saved: dict[str, Any]) -> str:
    """Markdown from the saved JSON."""
    parts = [heading("The training step", saved["machine_info"], [run_of(saved)]), _NOTES]
    on_gpu = "gpu" in saved["machine_info"]
    targets = GPU if on_gpu else CPU + _IF_BFLOAT16 * ("bfloat16" in saved["machine_info"])
    for step in saved["steps"]:
        size = (step["batch"], saved["backbone"], saved["side"])
        parts += [
            "## B {}, {}, {}²".format(*size),
            "Our loss differs from the published one, from the same weights and the same draws, by"
            f" {step['loss_difference']:.1g} of it.",
            _times(step["members"], on_gpu),
        ]
        if size == _SIZE:
            judged = verdicts(targets, step["members"])
            parts.append(f"### Targets\n\n{judged}")
    return "\n\n".join(parts) + "\n"


def _times(entries: Entries, on_gpu: bool) -> str:
    activity = ("launches", "host waits") if on_gpu else ("host reads",)
    facts = ("launches", "waits") if on_gpu else ("host_reads",)
    head = ("", "step", "images/s", "published over it", "it over its floor", "memory", *activity)
    rows = [
        (
            f"**{entry['name']}**" if entry["who"] == OURS else entry["name"],
            seconds(entry["seconds"][1]),
            f"{entry['images_per_second']:.3g}",
            ratio(entry["speedup"]),
            ratio(entry["over_floor"]) if "over_floor" in entry else "",
            memory(entry["memory"]) if "memory" in entry else "",
            *(str(entry[fact]) for fact in facts),
        )
        for entry in entries
    ]
    return table(head, rows)


def _ours(entries: Entries, who: str = OURS, **wanted: Any) -> list[dict[str, Any]]:
    """Our steps of one kind, or another's, the fastest first."""
    found = [e for e in entries if e["who"] == who and wanted.items() <= e.items()]
    return sorted(found, key=lambda entry: entry["seconds"][1])


def _fastest(what: str, bound: float, fact: str = "speedup", **wanted: Any) -> Target:
    """Our fastest step of a kind, against the published one in float32 or its floor."""
    slower = fact == "over_floor"

    def judge(entries: Entries) -> Verdict | None:
        for best in _ours(entries, **wanted):
            median = best[fact][1]
            met = median <= bound if slower else median >= bound
            return f"{ratio(best[fact])}: {best['name']}", met
        return None

    required = f"<= {bound:g}x its floor" if slower else f">= {bound:g}x published"
    return Target(f"full step, {what}", required, judge)


def _least(what: str, fact: str, at_most: float, over: str, **wanted: Any) -> Target:
    """The least of a fact among our steps of a kind, over the least among another's."""

    def judge(entries: Entries) -> Verdict | None:
        ours, theirs = (
            [e[fact] for e in _ours(entries, who, **wanted) if fact in e] for who in (OURS, over)
        )
        if not ours or not theirs:
            return None
        share = min(ours) / min(theirs)
        return f"{share:.3g}x", share <= at_most

    return Target(what, f"<= {at_most:g}x {over}", judge)


def _waits(entries: Entries) -> Verdict:
    reasons = [e["refused"] for e in _ours(entries) if e["refused"] is not None]
    most = max(e["waits"] for e in _ours(entries))
    return "; ".join([str(most), *dict.fromkeys(reasons)]), not (most or reasons)


_float32: dict[str, Any] = {"arithmetic": FLOAT32}
_bfloat16: dict[str, Any] = {"arithmetic": BFLOAT16, "channels_last": True}
_captured = {**_bfloat16, "captured": True}
CPU = (
    _fastest("float32", 1.45, **_float32),
    _fastest("float32", 0.85, "over_floor", **_float32),
    _fastest("bfloat16, channels_last", 0.85, "over_floor", **_bfloat16),
    _least("peak memory, float32", "memory", 1, SEPARATE, **_float32),
    _least("peak memory, bfloat16", "memory", 1, SEPARATE, **_bfloat16),
)
#: Of a processor that has its instructions.
_IF_BFLOAT16 = (_fastest("bfloat16, channels_last", 3.2, **_bfloat16),)
GPU = (
    _fastest("bfloat16, channels_last, captured", 4, **_captured),
    _fastest("float32", 2, **_float32),
    _fastest("bfloat16, channels_last, captured", 0.75, "over_floor", **_captured),
    _least("peak memory, float32", "memory", 0.8, PUBLISHED, **_float32),
    _least("peak memory, bfloat16", "memory", 0.8, PUBLISHED, arithmetic=BFLOAT16),
    _least("launches, bfloat16", "launches", 0.5, SEPARATE, captured=False, **_bfloat16),
    Target("host synchronizations of our step", "0", _waits),
)
