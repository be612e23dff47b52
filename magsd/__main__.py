"""`python -m magsd`: the same as the command `magsd`."""

from __future__ import annotations

from magsd.cli import main

if __name__ == "__main__":
    main()
