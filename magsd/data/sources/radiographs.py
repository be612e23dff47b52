"""Views of radiographs, as the tables of public sets name them."""

from __future__ import annotations

VIEWS = ("frontal", "PA", "AP")


def shows_view(view: str, choice: str) -> bool:
    """Whether a view (PA, AP, "AP Supine", L, ...) is the chosen one of `VIEWS`.

    AP stands for every anterior-posterior view, supine or erect; frontal for PA and AP.
    """
    view = view.strip().upper()
    chosen = ("PA", "AP") if choice == "frontal" else (choice,)
    return any(view == name or (name == "AP" and view.startswith("AP")) for name in chosen)
