"""Every stage has what the parts of the engine must know of it: whoever adds one is told here what is missing."""

import typing

from tetrion.engine import messages
from tetrion.engine.loop.progress import Answer
from tetrion.engine.loop.requests import LEGAL_TRANSITIONS, STAGE_STATES, RequestState
from tetrion.engine.planning.cost.profile import ClassCost
from tetrion.engine.request import PhaseJoules
from tetrion.engine.stages import AFTER_STEPS, AUX_FROM, AUX_STAGES, BEFORE_STEPS, NEXT_STAGE, STAGES


def test_stages_besides_denoising_come_before_or_after_it() -> None:
    assert (*BEFORE_STEPS, "denoise", *AFTER_STEPS) == STAGES and set(AUX_STAGES) == set(STAGES) - {"denoise"}
    assert AUX_FROM[STAGES[0]] == AUX_STAGES and AUX_FROM["denoise"] == AFTER_STEPS
    assert [NEXT_STAGE[stage] for stage in STAGES] == [*STAGES[1:], None]


def test_every_stage_has_a_command_that_is_answered() -> None:
    commands, answers = (typing.get_args(union) for union in (messages.StageCommand, Answer))
    assert tuple(command.stage for command in commands) == STAGES == tuple(answer.stage for answer in answers)
    assert set(commands) < set(typing.get_args(messages.Command))
    assert set(answers) < set(typing.get_args(messages.Event))


def test_a_request_passes_through_the_states_of_all_stages() -> None:
    assert tuple(STAGE_STATES) == STAGES
    for stage, (is_ready, is_in_it) in STAGE_STATES.items():
        following = NEXT_STAGE[stage]
        then = RequestState.FINISHED if following is None else STAGE_STATES[following][0]
        assert is_in_it in LEGAL_TRANSITIONS[is_ready] and then in LEGAL_TRANSITIONS[is_in_it]
        assert RequestState.WAITING in LEGAL_TRANSITIONS[is_in_it], "a lost worker begins it again"


def test_cost_tables_and_receipts_have_every_stage() -> None:
    cost = ClassCost.of({1: 1.0}, dict.fromkeys(AUX_STAGES, 2.0), {}, dict.fromkeys(AUX_STAGES, 3.0))
    assert cost.aux_ms == dict.fromkeys(AUX_STAGES, 2.0) and cost.aux_j == dict.fromkeys(AUX_STAGES, 3.0)
    assert PhaseJoules.__struct_fields__ == STAGES
