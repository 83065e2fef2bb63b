"""What a live proof shows so far: record and timeline of a mix, from the recordings in its folder."""

import msgspec

from benchmarks.proof.folder import ProofFolder
from benchmarks.proof.recorded_system import RecordedSystem, recorded_policies
from benchmarks.research.replay import command as replay
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.slo import beside_rows
from tetrion.entrypoints.bench.slo_points import Grid
from tetrion.entrypoints.bench.slo_run import Results, SloOptions, run_points
from tetrion.entrypoints.bench.slo_table import table
from tetrion.entrypoints.bench.timeline import command as timeline
from tetrion.entrypoints.record import make_record, write_record

TIMELINE_S = 20.0


def write_results(folder: ProofFolder, workload: Grid, mix: str, command_line: str) -> None:
    """Record and timeline of one mix, from its recordings."""
    assert folder.setup is not None
    setup, recordings = folder.setup, folder.recordings(mix)
    options = SloOptions(grid=workload, tables=only_table(folder.profile))
    results = Results(rows=[], diagnostics=[], base_slo_s=setup.base_slo_s)
    system = RecordedSystem(recordings)
    for point in (point for point in setup.points if point.mix == mix):
        if ran := recorded_policies(recordings, point):
            run_points(msgspec.structs.replace(options, policies=ran), [point], system, results)
    calls = [recording.facts["call"] for recording in recordings]
    made = make_record(command_line, results.rows) | beside_rows(options, system, results)
    made |= {"host": setup.host, "commit": setup.machine["commit"], "system": setup.machine}
    ledgers = {recording.facts["call"]: recording.facts.get("ledger") for recording in recordings}  # a call's latest
    made["calls"] = [{"begun": call, "runs": calls.count(call), "ledger": ledgers[call]} for call in ledgers]
    print(table(results.rows, results.diagnostics))
    made["agreement"] = replay(recordings=folder.file(mix, ".jsonl"))["rows"]
    write_record(made, folder.file(mix, ".json"))
    timeline(recordings=folder.file(mix, ".jsonl"), to_s=TIMELINE_S, png=folder.file(mix, ".png"))
