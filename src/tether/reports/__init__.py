"""Run folders to one self-contained HTML page."""

from tether.reports.comparison import comparison_report
from tether.reports.data import (
    Answer,
    ComparisonReport,
    Policy,
    PreferenceCurve,
    PreferencePoint,
    RLCurve,
    RLPoint,
    Sample,
    Stage,
)
from tether.reports.run import run_report

__all__ = [
    "Answer",
    "ComparisonReport",
    "Policy",
    "PreferenceCurve",
    "PreferencePoint",
    "RLCurve",
    "RLPoint",
    "Sample",
    "Stage",
    "comparison_report",
    "run_report",
]
