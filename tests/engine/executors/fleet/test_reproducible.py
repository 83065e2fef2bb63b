import pytest

from tetrion.engine.executors.fleet.reproducible import gemm_environment


@pytest.mark.parametrize(
    ("cpu", "added"),
    [("Intel(R) Xeon(R) Processor", {"MKL_CBWR": "AUTO,STRICT"}), ("AMD EPYC 7R13 Processor", {}), ("arm64", {})],
)
def test_strict_products_are_asked_for_on_intel_alone(cpu, added):
    assert gemm_environment({"PATH": "/bin"}, cpu) == added


def test_the_users_choice_stays():
    assert gemm_environment({"MKL_CBWR": "AVX2"}, "Intel(R) Xeon(R) Processor") == {}
