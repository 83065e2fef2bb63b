"""Write the traces of a deadline benchmark as JSONL files, one for each mix, rate, SLO scale and seed.

    python -m benchmarks.workloads.make_traces out/traces --devices 8 --mix uniform skewed --rate 12 24 --seed 11 12

The generators are those of `tetrion bench slo` (`entrypoints/bench/workloads.py`); a file pins what they drew, so that
a live run and a simulation see the same requests.
"""

import argparse
import itertools
from pathlib import Path

from tetrion.entrypoints.bench.workloads import (
    INTERACTIVE_AND_BATCH,
    MIXES,
    Workload,
    base_slo_s,
    make_trace,
    write_trace,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=8, help="Decides the base SLOs.")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=["uniform"])
    parser.add_argument("--rate", nargs="+", type=float, default=[12.0], help="Requests per minute.")
    parser.add_argument("--slo-scale", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seed", nargs="+", type=int, default=[11])
    parser.add_argument("--arrivals", choices=["poisson", "gamma", "diurnal", "production"], default="poisson")
    parser.add_argument("--tiers", action="store_true", help="70 % interactive, 30 % batch (SLO ×10, weight 0.25).")
    parser.add_argument("--num-requests", type=int, default=700)
    parser.add_argument("--num-steps", type=int, default=28)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for mix, rate, slo_scale, seed in itertools.product(given.mix, given.rate, given.slo_scale, given.seed):
        workload = Workload(
            rate_per_min=rate,
            num_requests=given.num_requests,
            num_steps=given.num_steps,
            mix=mix,
            slo_scale=slo_scale,
            base_slo_s=base_slo_s(given.devices),
            arrivals=given.arrivals,
            tiers=INTERACTIVE_AND_BATCH if given.tiers else (),
        )
        path = given.folder / f"{mix}-{rate:g}-x{slo_scale:g}-{given.arrivals}-{seed}.jsonl"
        write_trace(path, make_trace(workload, seed))
        print(path)


if __name__ == "__main__":
    main()
