"""`python -m benchmarks.probe FUNCTION`: forward and backward of one operation, for tools to watch.

compute-sanitizer and ncu slow a program down or replay it, and want little of it. What is called
between cudaProfilerStart and cudaProfilerStop has been called before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.harness.contender import Contender
from benchmarks.harness.device import command_line
from benchmarks.harness.sizes import PRECISIONS
from benchmarks.harness.subject import Row
from benchmarks.operations import SUBJECT


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where no compiled backend runs."""
    parser = command_line("probe", __doc__)
    parser.add_argument("function", choices=SUBJECT)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args(arguments)
    subject = SUBJECT[options.function]
    batch = max(options.batch, subject.least_batch)
    where = options.precision, options.device
    row = Row(subject, subject.networks[0], batch, *where, bool(subject.case.differentiable))
    backend = row.backend(options.backend)
    if backend == "reference":
        sys.stderr.write(f"no compiled backend of {subject.name} runs here\n")
        return 1
    call = Contender(backend, row, [row.draw(0)]).calls()[0]
    with torch.set_grad_enabled(row.backward):
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    sys.stdout.write(f"{row}: {backend}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
