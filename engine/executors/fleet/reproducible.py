"""What a worker's environment must say, before torch is loaded, for its matrix products to be reproducible."""

import os
from collections.abc import Mapping

from tetrion.engine.hardware.host import cpu_name


def gemm_environment(environment: Mapping[str, str] = os.environ, cpu: str | None = None) -> dict[str, str]:
    """Variables to add to `environment`, on this machine or one with processor `cpu`; the user's own choice stays.

    On Intel's processors MKL divides a long inner dimension among threads, so that results depend on their number
    (seen on one with AMX, with two threads from 1,536 on). Its strict conditional numerical reproducibility rules that
    out and was no slower there. Others are left alone: AMD's kept the promise without, and what MKL would choose for
    them is not known.
    """
    is_intel = "Intel" in (cpu_name() if cpu is None else cpu)
    return {"MKL_CBWR": "AUTO,STRICT"} if is_intel and "MKL_CBWR" not in environment else {}
