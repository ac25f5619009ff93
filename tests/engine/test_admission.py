"""Requests whose grammars are compiled hold up nobody."""

from threading import Event

from engine_fakes import make_request

from ernie_serve.engine.admission import Admission
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.messages import Grammar


class SlowCompiler(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self):
        super().__init__(Vocabulary([bytes([65 + i]) for i in range(26)]))
        self.go = Event()

    def matcher(self, grammar):
        assert self.go.wait(30)
        return super().matcher(grammar)


def grammar_request(name, pattern="A"):
    return make_request(name, [1], grammar=Grammar("regex", pattern))


def test_a_request_without_a_grammar_goes_straight_through():
    admission = Admission(SlowCompiler())
    for request in (make_request("a", [1]), make_request("b", [1], bad_words=((1,),))):
        admitted, constraint, error = admission.add(request)
        assert admitted is request
        assert (constraint is not None) == request.sampling.is_constrained
        assert not error
    assert not admission.is_waiting


def test_a_grammar_is_compiled_aside_and_known_from_then_on():
    compiler = SlowCompiler()
    admission = Admission(compiler)
    assert admission.add(grammar_request("a")) is None
    assert list(admission.take(patiently=False)) == []
    assert admission.is_waiting
    compiler.go.set()
    assert [request.request_id for request, _, _ in wait_for(admission)] == ["a"]
    assert not admission.is_waiting
    assert admission.add(grammar_request("b")) is not None


def wait_for(admission):
    while not (ready := list(admission.take(patiently=True))):
        assert admission.is_waiting
    return ready


def test_a_grammar_that_does_not_compile_is_told_with_its_reason():
    compiler = SlowCompiler()
    compiler.go.set()
    admission = Admission(compiler)
    admission.add(grammar_request("a", "("))
    [(_, constraint, error)] = wait_for(admission)
    assert constraint is None
    assert "regex" in error


def test_a_request_that_is_aborted_meanwhile_does_not_come_out():
    compiler = SlowCompiler()
    admission = Admission(compiler)
    admission.add(grammar_request("a"))
    admission.abort("a")
    admission.abort("unknown")
    compiler.go.set()
    assert not admission.is_waiting
    assert list(admission.take(patiently=True)) == []


def test_two_requests_of_one_name_do_not_both_wait():
    admission = Admission(compiler := SlowCompiler())
    admission.add(grammar_request("a"))
    assert "ids must differ" in admission.add(grammar_request("a"))[2]
    compiler.go.set()


def test_without_a_vocabulary_nothing_can_be_promised():
    admission = Admission(None)
    assert admission.add(make_request("a", [1]))[2] == ""
    assert "vocabulary" in admission.add(grammar_request("b"))[2]
