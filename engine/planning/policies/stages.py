"""The stages besides denoising as most policies start them: at once, on any idle device that serves them, ahead of
denoising."""

from collections.abc import Sequence

from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.snapshot import RequestView
from tetrion.engine.stages import AUX_STAGES


def start_aux(builder: RoundBuilder, requests: Sequence[RequestView]) -> None:
    """Start every ready decode, then every ready encode (the last stages first), in the order given, while devices are
    idle. Devices that requests in denoising hold are taken last."""
    held = {device for request in requests if request.stage == "denoise" for device in request.members}
    for stage in reversed(AUX_STAGES):
        for request in requests:
            if not builder.idle_for(stage):
                break
            if request.stage == stage and builder.is_ready(request):
                builder.start(request, claimed=held)


def ready_to_denoise(builder: RoundBuilder, requests: Sequence[RequestView]) -> list[RequestView]:
    """Those whose next chunk may start now, in the order given."""
    return [request for request in requests if request.stage == "denoise" and builder.is_ready(request)]
