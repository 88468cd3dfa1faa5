"""Ties between scales are told apart by their order, whatever the processor, and resamples choose what was tried."""

import numpy as np

from lora_opcm.lab.evidence.choice import chosen
from lora_opcm.lab.evidence.outcomes import Outcome, Trial
from lora_opcm.lab.evidence.tables import accuracy, published

SIZES = [7, 11]


def test_equal_candidates_are_chosen_by_order():
    bits = np.random.default_rng(0).random(sum(SIZES)) < 0.6
    assert set(chosen({(0, step): bits for step in range(3)}, SIZES)[1:]) == {(0, 0)}


def test_a_resample_never_chooses_what_was_not_tried_on_test_texts():
    rng = np.random.default_rng(1)
    validation = {(0, step): rng.random(sum(SIZES)) < 0.6 for step in range(5)}
    first = chosen(validation, SIZES)[0]
    tried = {c: np.ones(4, bool) for c in {first, (0, 3)}}
    outcome = Outcome(Trial("part", "row", "cat", ("a", "b")), [1.0], 1.0, validation, tried, {"validation": SIZES})
    assert outcome.picked[0] == first and set(outcome.picked) <= set(tried)


def test_every_published_outcome_has_an_accuracy():
    for outcome in published().outcomes:
        found = accuracy(outcome)
        assert found.shape[1] == len(outcome.trial.tasks) and (found >= 0).all() and (found <= 1 + 1e-6).all()
