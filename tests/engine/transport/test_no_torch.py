import subprocess
import sys


def test_the_engine_side_imports_neither_torch_nor_a_resource_tracker() -> None:
    script = (
        "import sys; import tetrion.engine.transport.channel, tetrion.engine.transport.image_slab;"
        "print([name for name in ('torch', 'multiprocessing.resource_tracker') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
