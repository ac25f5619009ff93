import jinja2
import pytest

from ernie_serve.text.sandbox import SandboxedTemplate, TemplateLimit


def render(source, **variables):
    return SandboxedTemplate(source, max_steps=10_000, max_seconds=2.0, max_chars=100_000).render(variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% endfor %}",
        "{% for a in range(1000) %}{% for b in range(1000) %}{% set x = b %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
        "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call m() %}" * 20
        + "x"
        + "{% endcall %}" * 20,
        "{% set x %}{% for a in range(99999) %}y{% endfor %}{% endset %}{{ x }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 9 ** 99999 }}",
        "{% for a in range(9000) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(source):
    with pytest.raises(TemplateLimit):
        render(source)


def test_seconds_are_counted_too():
    template = SandboxedTemplate(
        "{% for a in range(99999) %}{% set x = a | string | length %}{% endfor %}", max_seconds=0.0
    )
    with pytest.raises(TemplateLimit, match="seconds"):
        template.render({})


def test_ranges_are_bounded():
    with pytest.raises(OverflowError):
        render("{% for a in range(10 ** 9) %}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ x.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ [].append(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include 'x' %}",
        "{{ lipsum(5) }}",
        "{{ environment.count_step() }}",
    ],
)
def test_python_stays_out_of_reach(source):
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(source + "{{ x.y.z }}", x={})


def test_variables_cannot_be_changed():
    value = [1]
    with pytest.raises(jinja2.exceptions.SecurityError):
        render("{{ x.append(2) }}", x=value)
    assert value == [1]


def test_blocks_leave_no_lines_and_loops_have_controls():
    source = "a\n  {% for x in [1, 2, 3] %}\n{% if x == 2 %}{% continue %}{% endif %}\n{{ x }}\n  {% endfor %}\nb"
    assert render(source) == "a\n1\n3\nb"


def test_generation_tags_render_their_body():
    assert render("{% generation %}{% set a = 1 %}x{{ a }}{% endgeneration %}y") == "x1y"


def test_json_is_readable_and_not_escaped_for_html():
    assert render("{{ x | tojson }}", x={"a": "<你>", "b": [None, True]}) == '{"a": "<你>", "b": [null, true]}'
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ x | tojson(separators=(',', ':')) }}", x={"b": [1, 2]}) == '{"b":[1,2]}'


def test_ascii_json_keeps_marks():
    assert render("{{ x | tojson(ensure_ascii=true) }}", x="é🙂\ufdd0\n") == '"\\u00e9\\ud83d\\ude42\ufdd0\\n"'


def test_raise_exception_carries_its_words():
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_year_can_be_written():
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_what_a_template_reads_and_does_is_known():
    template = SandboxedTemplate("{% if tools %}{{ tools | upper }}{% endif %}{{ m.content.split('</t>') }}")
    assert template.variables == {"tools", "m"}
    assert template.operations == {"upper", "content", "split"}
    assert template.constants == {"</t>"}
