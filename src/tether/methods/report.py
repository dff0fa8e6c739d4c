"""``tether report``: a run folder to one HTML page."""

from __future__ import annotations

from pathlib import Path


def run(folder: Path, out: Path | None = None) -> Path:
    """Write the report of the run in ``folder`` to ``out`` (by default ``folder/report.html``); returns its path.

    Raises UserError where ``folder`` is no run folder, StorageError where ``out`` can't be written.
    """
    from tether.core.errors import UserError
    from tether.reports import run_report
    from tether.runs.storage import write_text

    target = Path(out) if out is not None else Path(folder) / "report.html"
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder; make it first, or give another --out")
    write_text(target, run_report(Path(folder)))
    return target
