"""A token that a constraint lets through is one the request allows, and forcing and ending happen on time."""

import numpy as np
import pytest

from ernie_serve.engine.constraint import Constraint
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.grammar.matcher import MaskFiller
from ernie_serve.messages import Grammar, SamplingParams

TOKENS = [bytes([65 + i]) for i in range(26)] + [b"<eos>", b"</think>"]
N, EOS, END = len(TOKENS), 26, 27
VOCABULARY = Vocabulary(TOKENS, frozenset({EOS, END}))
COMPILER = GrammarCompiler(VOCABULARY)
FILLER = MaskFiller(1)


def make(grammar=None, **options):
    sampling = SamplingParams(max_tokens=99, seed=0, grammar=grammar, **options)
    return Constraint(sampling, N, COMPILER.matcher(grammar) if grammar else None)


def allowed(constraint) -> set[int]:
    row = bytearray(VOCABULARY.bytes_per_mask)
    if constraint.matcher is not None:
        FILLER.fill([(constraint.matcher, 0)], row, len(row))
    bits = np.frombuffer(row, np.uint8)
    constraint.finish_mask(bits)
    ids = set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())
    assert ids
    assert max(ids) < N
    return ids


def letters(text: str) -> list[int]:
    return [ord(c) - 65 for c in text]


def say(constraint, text: str):
    for token_id in letters(text):
        assert token_id in allowed(constraint)
        constraint.advance(token_id)


def test_allowed_ids_are_all_there_are():
    constraint = make(allowed_token_ids=(3, 5, EOS, 4000, -1))
    for token_id in (3, 5, 5):
        assert allowed(constraint) == {3, 5, EOS}
        constraint.advance(token_id)


def test_a_bad_word_is_never_completed():
    constraint = make(bad_words=(tuple(letters("AB")), tuple(letters("C")), tuple(letters("AAB"))))
    everything = set(range(N)) - set(letters("C"))
    assert allowed(constraint) == everything
    say(constraint, "A")
    assert allowed(constraint) == everything - set(letters("B"))
    say(constraint, "D")
    assert allowed(constraint) == everything


@pytest.mark.parametrize("bound", [{"bad_words": ((3,),)}, {"allowed_token_ids": (0, 1, EOS)}])
def test_before_min_tokens_nothing_ends_an_answer_that_no_grammar_binds(bound):
    constraint = make(stop_token_ids=(EOS, END), min_tokens=2, **bound)
    for _ in range(2):
        assert not {EOS, END} & allowed(constraint)
        constraint.advance(0)
    assert EOS in allowed(constraint)


def test_stop_ids_are_allowed_exactly_where_the_grammar_may_end():
    constraint = make(Grammar("regex", "AB?"), stop_token_ids=(EOS, END))
    assert allowed(constraint) == set(letters("A"))
    say(constraint, "A")
    assert allowed(constraint) == {*letters("B"), EOS, END}
    constraint.advance(EOS)
    assert constraint.has_ended


def test_a_stop_id_that_is_text_of_the_grammar_is_no_way_out_of_its_middle():
    constraint = make(Grammar("regex", "A[BC]D"), stop_token_ids=tuple(letters("C")))
    say(constraint, "A")
    assert allowed(constraint) == set(letters("B"))


def test_an_answer_ends_at_once_where_nothing_can_follow():
    constraint = make(Grammar("choice", '["ABC"]'), stop_token_ids=())
    say(constraint, "AB")
    assert not constraint.has_ended
    say(constraint, "C")
    assert constraint.has_ended


def test_before_min_tokens_a_grammar_ends_only_where_it_must():
    constraint = make(Grammar("regex", "A+"), stop_token_ids=(EOS,), min_tokens=2)
    say(constraint, "A")
    assert allowed(constraint) == set(letters("A"))
    say(constraint, "A")
    assert allowed(constraint) == {*letters("A"), EOS}
    hurried = make(Grammar("regex", "A+"), stop_token_ids=(EOS,), min_tokens=2, allowed_token_ids=tuple(letters("A")))
    say(hurried, "A")
    assert allowed(hurried) == set(letters("A"))


def test_text_before_the_trigger_is_free_but_cannot_end():
    constraint = make(Grammar("regex", "AB"), stop_token_ids=(EOS,), grammar_after_token_id=END)
    assert not constraint.is_idle
    for token_id in letters("XYZ"):
        assert allowed(constraint) == set(range(N)) - {EOS}
        constraint.advance(token_id)
    constraint.advance(END)
    assert allowed(constraint) == set(letters("A"))
    say(constraint, "AB")
    assert constraint.has_ended


def test_reasoning_that_does_not_end_is_ended():
    options = {"max_reasoning_tokens": 3, "reasoning_end_token_id": END}
    constraint = make(reasoning_end_forced_ids=(1, END, 2), **options)
    for _ in range(3):
        assert constraint.is_idle
        constraint.advance(7)
    for token_id in (1, END, 2):
        assert not constraint.is_idle
        assert allowed(constraint) == {token_id}
        constraint.advance(token_id)
    assert constraint.is_idle
    plain = make(**options)
    for _ in range(3):
        plain.advance(7)
    assert allowed(plain) == {END}


def test_reasoning_that_ends_in_time_is_left_alone():
    constraint = make(max_reasoning_tokens=3, reasoning_end_token_id=END)
    for token_id in (7, END, 7, 7, 7, 7):
        assert constraint.is_idle
        constraint.advance(token_id)


def test_a_budget_of_nothing_ends_reasoning_before_it_begins():
    assert allowed(make(max_reasoning_tokens=0, reasoning_end_token_id=END, allowed_token_ids=(1,))) == {END}


def test_forced_text_after_the_trigger_is_not_held_against_the_grammar():
    constraint = make(
        Grammar("regex", "AB"),
        grammar_after_token_id=END,
        max_reasoning_tokens=1,
        reasoning_end_token_id=END,
        reasoning_end_forced_ids=(9, END, 9, 9),
    )
    for token_id in (4, 9, END, 9, 9, 0, 1):
        assert token_id in allowed(constraint)
        constraint.advance(token_id)
    assert constraint.has_ended
    assert not constraint.error


def test_constraints_that_exclude_everything_are_an_error():
    constraint = make(Grammar("regex", "AB"), allowed_token_ids=tuple(letters("X")))
    allowed(constraint)
    assert (constraint.error != "", constraint.error_code) == (True, "no_token_left")


def test_a_matcher_that_fails_is_an_error():
    constraint = make(Grammar("regex", "AB"))
    constraint.advance(letters("Z")[0])
    assert "grammar" in constraint.error
    assert constraint.error_code == ""


@pytest.mark.parametrize(
    ("options", "is_constrained"),
    [
        ({}, False),
        ({"stop_token_ids": (1,), "min_tokens": 3}, False),
        ({"grammar": Grammar("json_object")}, True),
        ({"bad_words": ((1,),)}, True),
        ({"allowed_token_ids": (1,)}, True),
        ({"max_reasoning_tokens": 0}, True),
    ],
)
def test_only_those_that_ask_for_it_are_constrained(options, is_constrained):
    assert SamplingParams(max_tokens=1, seed=0, **options).is_constrained == is_constrained
