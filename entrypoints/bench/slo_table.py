"""The rows of `tetrion bench slo` as text for people."""

from collections.abc import Sequence

from tetrion.entrypoints.bench.slo_statistics import Row

HEADINGS = (
    ("policy", 24),
    ("mix", 12),
    ("rate", 8),
    ("SLO", 6),
    ("attained", 10),
    ("95 %", 14),
    ("worst class", 18),
    ("mean s", 9),
    ("p95 s", 9),
    ("p99 s", 9),
    ("GPU-s", 8),
    ("busy", 7),
    ("plan ms", 9),
    ("p99", 8),
)


def table(rows: Sequence[Row], diagnostics: Sequence[Row]) -> str:
    """One line a row. GPU-s: GPU-seconds per image; busy: utilisation; plan ms: mean and p99 time of a decision."""
    lines = ["".join(f"{name:<{width}}" for name, width in HEADINGS).rstrip()]
    for row, beside in zip(rows, diagnostics, strict=True):
        cells = _cells(row, beside)
        lines.append("".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, HEADINGS, strict=True)).rstrip())
    return "\n".join(lines)


def _cells(row: Row, beside: Row) -> list[str]:
    interval = row["ci95"]
    return [
        f"{row['policy'][:23]} ",
        f"{row['mix'][:11]} ",
        _number(row["rate_per_min"], ".3g"),
        f"×{row['slo_scale']:g}",
        _number(row["attainment"], ".3f"),
        "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
        _worst_class(row["attainment_by_class"]),
        _number(row["mean_s"], ".2f"),
        _number(row["p95_s"], ".2f"),
        _number(row["p99_s"], ".2f"),
        _number(row["gpu_s_per_image"], ".2f"),
        _number(beside["utilisation"], ".2f"),
        _number(beside["decision_ms"]["mean"], ".3f"),
        _number(beside["decision_ms"]["p99"], ".3f"),
    ]


def _worst_class(by_class: dict[str, float | None]) -> str:
    known = {size: share for size, share in by_class.items() if share is not None}
    if not known:
        return "–"
    size = min(known, key=known.__getitem__)
    return f"{size} {known[size]:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
