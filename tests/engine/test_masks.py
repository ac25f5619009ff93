"""The masks of a step are those of its constraints, each in its row."""

import pytest

from ernie_serve.engine.constraint import Constraint
from ernie_serve.engine.masks import MaskMaker
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.messages import Grammar, SamplingParams

VOCABULARY = Vocabulary([bytes([65 + i]) for i in range(26)])
COMPILER = GrammarCompiler(VOCABULARY)


def constraint(pattern=None, **options):
    grammar = Grammar("regex", pattern) if pattern else None
    sampling = SamplingParams(max_tokens=9, seed=0, grammar=grammar, **options)
    return Constraint(sampling, VOCABULARY.size, COMPILER.matcher(grammar) if grammar else None)


def rows(masks):
    size = masks.bytes_per_row
    for n, request_id in enumerate(masks.request_ids):
        bits = int.from_bytes(masks.bits[n * size : (n + 1) * size], "little")
        yield request_id, {i for i in range(8 * size) if bits >> i & 1}


@pytest.fixture
def maker():
    return MaskMaker(VOCABULARY.bytes_per_mask, num_threads=2)


def test_each_constraint_has_its_row(maker):
    idle = constraint(max_reasoning_tokens=5, reasoning_end_token_id=1)
    several = {"a": constraint("[AC]"), "idle": idle, "b": constraint(allowed_token_ids=(4,)), "c": constraint("B")}
    masks = maker.start(several)()
    maker.wait()
    assert dict(rows(masks)) == {"a": {0, 2}, "b": {4}, "c": {1}}


def test_where_all_are_free_there_are_no_masks(maker):
    assert maker.start({"a": constraint(max_reasoning_tokens=5, reasoning_end_token_id=1)}) is None
    assert maker.start({}) is None
    maker.wait()


def test_masks_that_nobody_asks_for_are_waited_for(maker):
    one = constraint("A?B")
    maker.start({"a": one})
    maker.wait()
    one.advance(0)
    assert dict(rows(maker.start({"a": one})())) == {"a": {1}}


def test_a_matcher_that_fails_spoils_only_its_own_row(maker):
    bad, good = constraint("A"), constraint("B")
    bad.advance(25)
    masks = maker.start({"bad": bad, "good": good})()
    assert bad.error
    assert not good.error
    assert dict(rows(masks))["good"] == {1}
    assert dict(rows(masks))["bad"]  # something to sample, and to drop


def test_a_grammar_that_grows_too_complex_midway_spoils_only_its_own_row(maker):
    bad, good = constraint("((((A{1,100}){1,100}){1,100}){1,100})"), constraint("B*")
    for _ in range(40):
        masks = dict(rows(maker.start({"bad": bad, "good": good})()))
        if bad.error:
            break
        assert masks["bad"] == {0}
        bad.advance(0)
    assert "grammar" in bad.error
    assert masks["bad"]
    assert 1 in masks["good"]
    assert not good.error
