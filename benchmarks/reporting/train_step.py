"""The report on whole training steps, and their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.steps import BFLOAT16, FLOAT32, OURS, PUBLISHED
from benchmarks.reporting.tables import memory, ratio, seconds, table
from benchmarks.reporting.targets import Verdict

#: The size of the published training, for which the targets hold.
_BATCH, _BACKBONE, _SIDE = 16, "resnet50", 224

Entry = dict[str, Any]


@dataclass(frozen=True)
class StepTarget:
    """Something that a step must reach; `judge` gives None where nothing was measured."""

    work: str
    required: str
    judge: Callable[[Sequence[Entry]], Verdict | None]


def render(saved: dict[str, Any]) -> str:
    """Markdown from the saved JSON."""
    parts = [_head(saved)]
    on_gpu = "gpu" in saved["machine_info"]
    for step in saved["steps"]:
        parts.append(f"## B {step['batch']}, {saved['backbone']}, {saved['side']}²")
        parts.append(
            "Our loss differs from the published one, from the same weights and the same draws, by"
            f" {step['loss_difference']:.1g} of it."
        )
        parts.append(_times(step["members"], on_gpu))
        size = (step["batch"], saved["backbone"], saved["side"])
        if size == (_BATCH, _BACKBONE, _SIDE):
            parts.append(_verdicts(step["members"], GPU if on_gpu else CPU))
    return "\n\n".join(parts) + "\n"


def _head(saved: dict[str, Any]) -> str:
    commit = saved["commit_info"]
    dirty = ", with uncommitted changes" if commit["dirty"] else ""
    run = f"{saved['datetime'][:10]}, commit {(commit['id'] or '?')[:12]}{dirty}"
    machine = table(
        ("", ""),
        [*((name, str(value)) for name, value in saved["machine_info"].items()), ("run", run)],
    )
    notes = (
        "Forward passes, backward and optimizer. Times are medians per step. A ratio is the median"
        " of the ratios within single rounds, in which all take their turn; in brackets its"
        " quartiles. The floor is four forward passes of the bare backbone and their backward, in"
        " the same arithmetic. Memory is parameters, gradients and momentum, and the peak of one"
        " step in torch's allocator over them. Host reads are what makes the host wait for a GPU:"
        " numbers read back and shapes that depend on data."
    )
    return f"# The training step: {saved['machine_info']['machine']}\n\n{machine}\n\n{notes}"


def _times(entries: Sequence[Entry], on_gpu: bool) -> str:
    activity = ("launches", "host waits") if on_gpu else ("host reads",)
    head = ("", "step", "images/s", "published over it", "it over its floor", "memory", *activity)
    rows = []
    for entry in entries:
        counts = (entry["launches"], entry["waits"]) if on_gpu else (entry["host_reads"],)
        name = f"**{entry['name']}**" if entry["who"] == OURS else entry["name"]
        rows.append(
            (
                name,
                seconds(entry["seconds"][1]),
                f"{entry['images_per_second']:.3g}",
                ratio(entry["speedup"], share=False),
                ratio(entry["over_floor"], share=False) if "over_floor" in entry else "",
                memory(entry["memory"]) if "memory" in entry else "",
                *map(str, counts),
            )
        )
    return table(head, rows)


def _verdicts(entries: Sequence[Entry], targets: Sequence[StepTarget]) -> str:
    rows = []
    for target in targets:
        verdict = target.judge(entries)
        measured, met = ("", "not measured")
        if verdict is not None:
            measured, met = verdict.measured, "met" if verdict.met else "**not met**"
        rows.append((target.work, target.required, measured, met))
    return "### Targets\n\n" + table(("work", "must reach", "measured", ""), rows)


def _find(entries: Sequence[Entry], who: str, arithmetic: str, **wanted: bool) -> list[Entry]:
    """Members of one kind, the fastest first."""
    settings = {"who": who, "arithmetic": arithmetic, **wanted}
    found = [e for e in entries if all(e[name] == value for name, value in settings.items())]
    return sorted(found, key=lambda entry: entry["seconds"][1])


def _faster(arithmetic: str, at_least: float, what: str, **wanted: bool) -> StepTarget:
    """Our fastest step of a kind, against the published one in float32."""

    def judge(entries: Sequence[Entry]) -> Verdict | None:
        found = _find(entries, OURS, arithmetic, **wanted)
        if not found:
            return None
        best = found[0]
        text = f"{ratio(best['speedup'], share=False)}: {best['name']}"
        return Verdict(text, best["speedup"][1] >= at_least)

    return StepTarget(f"full step, {what}", f">= {at_least:g}x published", judge)


def _near_floor(at_most: float) -> StepTarget:
    def judge(entries: Sequence[Entry]) -> Verdict | None:
        found = _find(entries, OURS, BFLOAT16, captured=True)
        if not found:
            return None
        over = found[0]["over_floor"]
        return Verdict(ratio(over, share=False), over[1] <= at_most)

    work = "full step, bfloat16, channels_last, captured"
    return StepTarget(work, f"<= {at_most:g}x its floor", judge)


def _memory(arithmetic: str, at_most: float) -> StepTarget:
    def judge(entries: Sequence[Entry]) -> Verdict | None:
        theirs = _find(entries, PUBLISHED, arithmetic)
        ours = [e for e in _find(entries, OURS, arithmetic) if "memory" in e]
        if not theirs or not ours:
            return None
        share = min(e["memory"] for e in ours) / theirs[0]["memory"]
        return Verdict(f"{share:.3g}x", share <= at_most)

    return StepTarget(f"peak memory, {arithmetic}", f"<= {at_most:g}x published", judge)


def _no_waits() -> StepTarget:
    def judge(entries: Sequence[Entry]) -> Verdict | None:
        ours = [e for e in entries if e["who"] == OURS]
        reasons = [e["refused"] for e in ours if e["refused"] is not None]
        most = max(e["waits"] for e in ours)
        return Verdict("; ".join([str(most), *dict.fromkeys(reasons)]), not (most or reasons))

    return StepTarget("host synchronizations of our step", "0", judge)


CPU = (
    _faster(FLOAT32, 1.2, "float32"),
    _faster(BFLOAT16, 2.5, "bfloat16, channels_last", channels_last=True),
)
GPU = (
    _faster(BFLOAT16, 4, "bfloat16, channels_last, captured", captured=True),
    _faster(FLOAT32, 2, "float32"),
    _near_floor(1.15),
    _memory(FLOAT32, 0.8),
    _memory(BFLOAT16, 0.8),
    _no_waits(),
)
