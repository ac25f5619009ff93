"""Whoever sends a hostile grammar is refused; who comes next does not notice."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ernie_serve.errors import InvalidRequest, Overloaded
from ernie_serve.grammar.checker import GrammarChecker
from ernie_serve.messages import Grammar


@pytest.fixture(scope="module")
def checker(vocabulary):
    checker = GrammarChecker(vocabulary, num_processes=2)
    yield checker
    checker.close()


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def tree_of_references(depth):
    definitions = {"d0": {"type": "string"}}
    for n in range(1, depth):
        definitions[f"d{n}"] = {
            "allOf": [{"$ref": f"#/$defs/d{n - 1}"}, {"anyOf": [{"$ref": f"#/$defs/d{n - 1}"}, {}]}]
        }
    return {"$defs": definitions, "$ref": f"#/$defs/d{depth - 1}"}


PAIRS = [
    {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}}, {"properties": {f"b{i}": {"type": "null"}}}]}
    for i in range(12)
]
HOSTILE = {
    "long strings": {"type": "string", "minLength": 10**6, "maxLength": 10**6},
    "many values": {"enum": [f"value {i}" for i in range(2000)]},
    "too many values": {"enum": list(range(10000))},
    "many branches": {"anyOf": [{"type": "object", "properties": {f"k{i}": {}}} for i in range(1000)]},
    "products of branches": {"allOf": [{"type": "object"}, *PAIRS]},
    "many options": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
    "long arrays": {"type": "array", "items": {"type": "array", "items": {}, "minItems": 10**9}, "maxItems": 10**9},
    "nested counts": {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100})$"},
    "nested stars": {"type": "string", "pattern": "(([a-z]*)*)*$"},
    "endless": {"$ref": "#"},
    "deep": nested(200),
    "as deep as allowed": nested(31),
    "references": tree_of_references(40),
    "patterns of names": {"patternProperties": {f"^a{i}[a-z]{{1,{i + 1}}}$": {} for i in range(300)}},
    "big steps": {"type": "integer", "multipleOf": 999999937, "minimum": 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_gets_a_verdict_and_the_next_grammar_too(checker, name):
    message = ""
    try:
        checker.check(Grammar("json_schema", json.dumps(HOSTILE[name])))
    except InvalidRequest as error:
        message = error.message
    assert len(message) < 400
    assert "non-verbose" not in message
    checker.check(Grammar("json_object"))


@pytest.mark.parametrize("name", ["too many values", "products of branches", "endless", "deep", "patterns of names"])
def test_some_of_them_are_refused(checker, name):
    with pytest.raises(InvalidRequest):
        checker.check(Grammar("json_schema", json.dumps(HOSTILE[name])))


def test_what_takes_too_long_is_killed_and_refused_and_the_rest_goes_on(vocabulary):
    """Whatever compiles for longer than no time at all stands for what compiles for minutes."""
    checker = GrammarChecker(vocabulary, num_processes=1, timeout_seconds=0.0)
    with pytest.raises(InvalidRequest, match="takes more than 0 s"):
        checker.check(Grammar("json_schema", json.dumps(HOSTILE["many branches"])))
    checker._timeout_seconds = 10.0
    checker.check(Grammar("json_object"))
    with pytest.raises(InvalidRequest, match="takes more than"):
        checker.check(Grammar("json_schema", json.dumps(HOSTILE["many branches"])))  # remembered
    checker.close()


def test_a_machine_that_is_busy_is_no_fault_of_the_grammar(vocabulary, monkeypatch):
    monkeypatch.setattr("ernie_serve.grammar.checker._PATIENCE", 0.2)
    checker = GrammarChecker(vocabulary, num_processes=1, timeout_seconds=0.5)
    checker.check(Grammar("regex", "a"))
    child = checker._idle.get()
    child._process.send_signal(signal.SIGSTOP)  # it has no time to compute, as beside an engine that takes every core
    checker._idle.put(child)
    with pytest.raises(Overloaded):
        checker.check(Grammar("json_object"))
    checker.check(Grammar("json_object"))
    checker.close()


def test_what_computes_in_time_may_take_longer_by_the_clock(vocabulary):
    checker = GrammarChecker(vocabulary, num_processes=1, timeout_seconds=0.3)
    checker.check(Grammar("regex", "a"))
    child = checker._idle.get()
    child._process.send_signal(signal.SIGSTOP)
    waking = threading.Timer(1.0, child._process.send_signal, (signal.SIGCONT,))
    waking.start()
    checker._idle.put(child)
    checker.check(Grammar("regex", "b"))
    checker.close()


def test_a_process_that_died_is_replaced(vocabulary):
    checker = GrammarChecker(vocabulary, num_processes=1, timeout_seconds=10.0)
    checker.check(Grammar("json_object"))
    child = checker._idle.get()
    child._process.kill()
    child._process.wait()
    checker._idle.put(child)
    checker.check(Grammar("regex", "a"))
    checker.close()


def test_many_threads_may_check_at_once(checker):
    grammars = [Grammar("regex", f"[a-z]{{{n}}}") for n in range(1, 30)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(checker.check, grammars)) == [None] * 29


def test_verdicts_are_bounded(vocabulary):
    checker = GrammarChecker(vocabulary, num_processes=1, max_verdicts=3)
    for n in range(9):
        checker.check(Grammar("regex", f"a{n}"))
    assert len(checker._verdicts) == 3
    checker.close()
