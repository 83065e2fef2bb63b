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
    ("to first", 22),
    ("possible", 16),
    ("worst class", 28),
    ("refused", 9),
    ("mean s", 9),
    ("p95 s", 9),
    ("p99 s", 9),
    ("late s", 8),
    ("GPU-s", 8),
    ("busy", 7),
    ("plan ms", 9),
    ("p99", 8),
    ("CPU ms", 8),
    ("lost", 7),
)


def table(rows: Sequence[Row], diagnostics: Sequence[Row]) -> str:
    """One line a row. to first: attainment minus the first policy's on the same requests, in points, with its interval;
    possible: the bound, and what share of it the policy attained; late s: by how much the worst request missed its
    deadline; GPU-s: GPU-seconds per image; busy: utilisation; plan ms: mean and p99 time of a decision; CPU ms: the
    engine's for each command; lost: share of device time idle beside a request that could have run, deliberate waits
    apart. Without bounds, refusals, or with one policy only, their column is left out. Below each row with tenants is
    a line for each of them: its attainment, latencies, and its share of the device time that requests took."""
    shown = {"possible": any(row["bound"] is not None for row in rows)}
    shown["refused"] = any(row["refused"] for row in rows)
    shown["to first"] = any(beside["difference"] is not None for beside in diagnostics)
    keep = [i for i, (name, _) in enumerate(HEADINGS) if shown.get(name, True)]
    lines = [[name for name, _ in HEADINGS]]
    for row, beside in zip(rows, diagnostics, strict=True):
        lines += [_cells(row, beside), *_tenants(row)]
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
        _difference(beside["difference"]),
        _possible(row["bound"], beside["share_of_the_possible"]),
        _worst_class(row["attainment_by_class"]),
        f"{row['refused'] / row['requests']:.1%}",
        _number(row["mean_s"], ".2f"),
        _number(row["p95_s"], ".2f"),
        _number(row["p99_s"], ".2f"),
        _number(beside["worst_lateness_s"], ".1f"),
        _number(row["gpu_s_per_image"], ".2f"),
        _number(beside["utilisation"], ".2f"),
        _number(beside["decision_ms"]["mean"], ".3f"),
        _number(beside["decision_ms"]["p99"], ".3f"),
        _number(beside["engine_cpu_ms_per_command"], ".2f"),
        _number(beside["idle_while_runnable"], ".2%"),
    ]


def _tenants(row: Row) -> list[list[str]]:
    """A line for each tenant, in the columns of a row."""
    spent_s = [tenant["device_s"] for tenant in row["by_tenant"].values()]
    total_s = None if None in spent_s else sum(spent_s)
    lines = []
    for name, tenant in row["by_tenant"].items():
        share = tenant["device_s"] / total_s if total_s else None
        known = {
            "policy": f"  tenant {name}"[:23],
            "attained": _number(tenant["attainment"], ".3f"),
            "refused": f"{tenant['refused'] / tenant['requests']:.1%}",
            "mean s": _number(tenant["mean_s"], ".2f"),
            "p99 s": _number(tenant["p99_s"], ".2f"),
            "busy": _number(share, ".0%"),
        }
        lines.append([known.get(heading, "") + " " for heading, _ in HEADINGS])
    return lines


def _difference(compared: Row | None) -> str:
    if compared is None:
        return "–"
    low, high = compared["ci95"]
    return f"{100 * compared['attainment']:+.1f} ({100 * low:+.1f}…{100 * high:+.1f})"


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
