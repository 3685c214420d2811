from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pss import PSSConfig
from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision, InterventionHistory, Policy
from hf_pss.errors import StateError

SPIKE = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
DROP = Judgement(Verdict.SPIKE, "stable_rank_drop", ("w",), 1.0, 9.0, 4.5)
FLOOR = Judgement(Verdict.SPIKE, "stable_rank_floor", ("w",), 1.0, None, 16.0)
NORMAL = Judgement(Verdict.NORMAL, "grad_norm_ratio", (), 1.0, 1.0, 2.5)
CALIBRATING = Judgement(Verdict.CALIBRATING, "grad_norm_ratio")
NON_FINITE = Judgement(Verdict.NON_FINITE, "grad_norm_ratio", ("global",), math.nan)
SANE_RANK = Judgement(Verdict.NORMAL, "stable_rank_floor", (), 20.0, None, 16.0)


def policy_of(**options: Any) -> Policy:
    """Return a policy with the options' own defaults, but for those given."""
    config = PSSConfig.preset("paper", **options)
    return Policy(
        cooldown_steps=config.cooldown_steps,
        max_interventions=config.max_interventions,
        on_nonfinite=config.on_nonfinite,
        max_nonfinite_streak=config.max_nonfinite_streak,
    )


def run(
    policy: Policy, *steps: tuple[int, Judgement]
) -> tuple[list[Decision], InterventionHistory]:
    history = InterventionHistory()
    decisions = []
    for step, judgement in steps:
        decision, history = policy.decide(judgement, step=step, history=history)
        decisions.append(decision)
    return decisions, history


def actions(policy: Policy, *steps: tuple[int, Judgement]) -> list[str]:
    return [decision.action.value for decision in run(policy, *steps)[0]]


def test_nothing_noticed_continues_and_is_not_remembered() -> None:
    decisions, history = run(policy_of(), (1, CALIBRATING), (2, NORMAL))
    assert decisions == [
        Decision(Action.CONTINUE, "calibrating"),
        Decision(Action.CONTINUE, "normal"),
    ]
    assert history == InterventionHistory()


def test_spike_acts_and_is_remembered() -> None:
    decisions, history = run(policy_of(), (7, SPIKE))
    assert decisions == [Decision(Action.ACT, "grad_norm_ratio")]
    assert history == InterventionHistory(last_intervention_step=7, num_interventions=1)


def test_cooldown_holds_for_its_steps_and_ends() -> None:
    decisions, history = run(policy_of(cooldown_steps=3), *((step, SPIKE) for step in range(9)))
    assert [d.action for d in decisions] == [
        Action.ACT if step in (0, 4, 8) else Action.OBSERVE for step in range(9)
    ]
    assert {d.reason for d in decisions if d.action is Action.OBSERVE} == {"cooldown"}
    assert history.num_interventions == 3


def test_no_cooldown_still_means_one_intervention_a_step() -> None:
    policy = policy_of(cooldown_steps=0)
    assert actions(policy, (1, SPIKE), (1, DROP), (2, SPIKE)) == ["act", "observe", "act"]


def test_floor_neither_obeys_nor_starts_the_cooldown() -> None:
    policy = policy_of(cooldown_steps=50)
    assert actions(
        policy, (10, FLOOR), (11, SPIKE), (12, FLOOR), (20, FLOOR), (21, SPIKE), (22, DROP)
    ) == ["act", "act", "act", "act", "observe", "observe"]


def test_budget_counts_all_interventions_of_the_run() -> None:
    policy = policy_of(cooldown_steps=0, max_interventions=2)
    decisions, _ = run(policy, (1, SPIKE), (2, FLOOR), (3, SPIKE), (4, FLOOR))
    assert [d.action for d in decisions[:2]] == [Action.ACT] * 2
    assert decisions[2:] == [Decision(Action.OBSERVE, "budget")] * 2


def test_budget_of_zero_only_observes() -> None:
    assert actions(policy_of(max_interventions=0), (1, SPIKE), (2, FLOOR)) == ["observe"] * 2


def test_stop_stops_at_the_first_non_finite_step() -> None:
    decisions, history = run(policy_of(on_nonfinite="stop"), (3, NON_FINITE))
    assert decisions == [Decision(Action.STOP, "non-finite step")]
    assert (history.num_nonfinite_steps, history.last_nonfinite_step) == (1, 3)


def test_skip_skips_until_the_streak_is_too_long() -> None:
    policy = policy_of(max_nonfinite_streak=3)
    decisions, _ = run(policy, *((step, NON_FINITE) for step in range(1, 4)))
    assert [d.action for d in decisions] == [Action.SKIP_UPDATE] * 2 + [Action.STOP]
    assert decisions[-1].reason.startswith("3 non-finite steps in a row")


@pytest.mark.parametrize("options", [{"on_nonfinite": "stop"}, {"max_nonfinite_streak": 1}])
def test_after_the_update_nothing_is_left_to_skip_but_a_run_still_stops(
    options: dict[str, Any],
) -> None:
    def decide(policy: Policy) -> Decision:
        return policy.decide(
            NON_FINITE, step=1, history=InterventionHistory(), is_after_update=True
        )[0]

    assert decide(policy_of()) == Decision(Action.OBSERVE, "after the update")
    assert decide(policy_of(**options)).action is Action.STOP


def test_finite_step_ends_the_streak_but_not_the_count() -> None:
    policy = policy_of(max_nonfinite_streak=2)
    steps = [(1, NON_FINITE), (2, NORMAL), (3, NON_FINITE), (4, SPIKE), (5, NON_FINITE)]
    decisions, history = run(policy, *steps)
    assert Action.STOP not in {d.action for d in decisions}
    assert (history.num_nonfinite_steps, history.nonfinite_streak) == (3, 1)


def test_streak_needs_no_finite_judgement_to_end() -> None:
    """Detectors of weights judge every tenth step, and a run without detectors has none at all."""
    policy = policy_of(max_nonfinite_streak=2)
    assert actions(policy, (1, NON_FINITE), (50, NON_FINITE), (51, NON_FINITE)) == [
        "skip_update",
        "skip_update",
        "stop",
    ]


def test_later_readings_of_the_same_step_neither_add_to_the_streak_nor_end_it() -> None:
    policy = policy_of(max_nonfinite_streak=2)
    steps = [(1, NON_FINITE), (1, NON_FINITE), (1, SANE_RANK), (2, NON_FINITE), (2, SANE_RANK)]
    decisions, history = run(policy, *steps)
    assert [d.action.value for d in decisions] == [
        "skip_update",
        "skip_update",
        "continue",
        "stop",
        "continue",
    ]
    assert history.num_nonfinite_steps == 2


def test_non_finite_steps_leave_cooldown_and_budget_alone() -> None:
    policy = policy_of(cooldown_steps=3, max_interventions=2)
    with_one = run(policy, (1, SPIKE), (2, NON_FINITE), (4, SPIKE), (5, SPIKE), (9, SPIKE))[0]
    without = run(policy, (1, SPIKE), (4, SPIKE), (5, SPIKE), (9, SPIKE))[0]
    assert with_one[:1] + with_one[2:] == without


@given(
    st.lists(st.sampled_from([SPIKE, DROP, FLOOR, NORMAL, NON_FINITE]), max_size=60),
    st.integers(0, 5),
    st.integers(0, 10),
)
def test_never_more_than_the_budget_nor_closer_than_the_cooldown(
    judgements: list[Judgement], cooldown_steps: int, budget: int
) -> None:
    policy = policy_of(cooldown_steps=cooldown_steps, max_interventions=budget)
    decisions, history = run(policy, *enumerate(judgements))
    acted = [step for step, d in enumerate(decisions) if d.action is Action.ACT]
    assert len(acted) == history.num_interventions <= budget
    cooled = [step for step in acted if judgements[step] is not FLOOR]
    assert all(b - a > cooldown_steps for a, b in itertools.pairwise(cooled))


def test_decide_is_pure() -> None:
    policy, history = (
        policy_of(),
        InterventionHistory(num_interventions=4, last_intervention_step=2),
    )
    first = policy.decide(SPIKE, step=50, history=history)
    assert policy.decide(SPIKE, step=50, history=history) == first
    assert history == InterventionHistory(num_interventions=4, last_intervention_step=2)


@pytest.mark.parametrize(
    "history",
    [
        InterventionHistory(),
        InterventionHistory(
            last_intervention_step=40,
            num_interventions=3,
            num_nonfinite_steps=9,
            last_nonfinite_step=77,
            nonfinite_streak=2,
        ),
    ],
)
def test_history_comes_back_through_json(history: InterventionHistory) -> None:
    saved = json.dumps(history.state_dict(), allow_nan=False)
    assert InterventionHistory.from_state_dict(json.loads(saved)) == history


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"num_interventions": -1}, "num_interventions"),
        ({"num_interventions": 1.0}, "num_interventions"),
        ({"num_interventions": math.nan}, "num_interventions"),
        ({"nonfinite_streak": None}, "nonfinite_streak"),
        ({"last_intervention_step": "7"}, "last_intervention_step"),
        ({"last_nonfinite_step": True}, "last_nonfinite_step"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damaged_history_is_refused(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=message):
        InterventionHistory.from_state_dict({**InterventionHistory().state_dict(), **damage})


@pytest.mark.parametrize("key", sorted(InterventionHistory().state_dict()))
def test_truncated_history_is_refused(key: str) -> None:
    state = {k: v for k, v in InterventionHistory().state_dict().items() if k != key}
    with pytest.raises(StateError, match=key):
        InterventionHistory.from_state_dict(state)
