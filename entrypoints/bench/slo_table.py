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
    ("possible", 16),
    ("worst class", 18),
    ("mean s", 9),
    ("p95 s", 9),
    ("p99 s", 9),
    ("late s", 8),
    ("GPU-s", 8),
    ("busy", 7),
    ("plan ms", 9),
    ("p99", 8),
)


def table(rows: Sequence[Row], diagnostics: Sequence[Row]) -> str:
    """One line a row. possible: the bound, and what share of it the policy attained; late s: by how much the worst
    request missed its deadline; GPU-s: GPU-seconds per image; busy: utilisation; plan ms: mean and p99 time of a
    decision. Without bounds that column is left out."""
    known = any(row["bound"] is not None for row in rows)
    keep = [i for i, (name, _) in enumerate(HEADINGS) if known or name != "possible"]
    lines = [
        [name for name, _ in HEADINGS],
        *(_cells(row, beside) for row, beside in zip(rows, diagnostics, strict=True)),
    ]
    return "\n".join("".join(f"{cells[i]:<{HEADINGS[i][1]}}" for i in keep).rstrip() for cells in lines)


def _cells(row: Row, beside: Row) -> list[str]:
    interval = row["ci95"]
    return [
        f"{row['policy'][:23]} ",
        f"{row['mix'][:11]} ",
        _number(row["rate_per_min"], ".3g"),
        f"×{row['slo_scale']:g}",
        _number(row["attainment"], ".3f"),
        "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
        _possible(row["bound"], beside["share_of_the_possible"]),
        _worst_class(row["attainment_by_class"]),
        _number(row["mean_s"], ".2f"),
        _number(row["p95_s"], ".2f"),
        _number(row["p99_s"], ".2f"),
        _number(beside["worst_lateness_s"], ".1f"),
        _number(row["gpu_s_per_image"], ".2f"),
        _number(beside["utilisation"], ".2f"),
        _number(beside["decision_ms"]["mean"], ".3f"),
        _number(beside["decision_ms"]["p99"], ".3f"),
    ]


def _possible(bound: float | None, share: float | None) -> str:
    return "–" if bound is None else f"{bound:.3f} ({_number(share, '.0%')})"


def _worst_class(by_class: dict[str, float | None]) -> str:
    known = {size: share for size, share in by_class.items() if share is not None}
    if not known:
        return "–"
    size = min(known, key=known.__getitem__)
    return f"{size} {known[size]:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
