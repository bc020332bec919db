"""Chat templates: what published ones use works, and whatever one does wrong has a reason."""

from __future__ import annotations

import pickle
from datetime import datetime
from typing import Any

import pytest
from lmesh_kernels.text.template import TemplateError, render

HELLO = [{"role": "user", "content": "hello"}]


def rendered(template: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    defaults: dict[str, Any] = {"add_generation_prompt": False, "special_tokens": {"bos_token": "<s>"}}
    return render(template, messages=HELLO if messages is None else messages, **defaults | options)


def failure(template: str, **options: Any) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        rendered(template, **options)
    return caught.value


def test_a_usual_template() -> None:
    template = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    [{{ message['role'] }}] {{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": " hi "}]
    assert rendered(template, messages, add_generation_prompt=True) == "<s>\n    [user] hi\n[assistant]"


def test_blocks_leave_no_whitespace_of_their_own() -> None:
    assert rendered("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_tojson_is_not_escaped_for_html() -> None:
    tools = [{"name": "f<x>&'", "text": "é"}]
    assert rendered("{{ tools | tojson }}", tools=tools) == '[{"name": "f<x>&\'", "text": "é"}]'
    assert rendered("{{ tools[0].name | tojson(indent=2) }}", tools=tools) == '"f<x>&\'"'


def test_today_can_be_written() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    assert rendered("{{ strftime_now('%Y-%m-%d') }}") in {before, datetime.now().strftime("%Y-%m-%d")}


def test_assistant_marks_are_rendered_through() -> None:
    assert rendered("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c") == "abhelloc"


def test_extra_variables_reach_the_template_and_replace_no_message() -> None:
    extra = {"enable_thinking": True, "documents": ["d"], "messages": [], "add_generation_prompt": True}
    template = "{{ enable_thinking }} {{ documents[0] }} {{ messages | length }} {{ add_generation_prompt }}"
    assert rendered(template, extra=extra) == "True d 1 False"


def test_a_variable_that_is_not_there_is_empty() -> None:
    assert rendered("[{{ nothing }}{% if nothing is defined %}x{% endif %}]") == "[]"


def test_a_template_may_refuse_the_messages() -> None:
    error = failure("{{ raise_exception('roles must alternate') }}")
    assert error.reason == "TEMPLATE_REFUSED" and "roles must alternate" in error.message


def test_a_refusal_cannot_fill_the_log() -> None:
    assert len(failure("{{ raise_exception('x' * 1000000) }}").message) < 2000


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ 'a' ", "{% nonsense %}", "{% for a in b %}", "{{ a | nofilter }}"]
)
def test_what_is_no_jinja_is_invalid(template: str) -> None:
    error = failure(template)
    assert error.reason == "TEMPLATE_INVALID" and "line 1" in error.message


def test_nesting_beyond_the_compiler_is_invalid() -> None:
    assert failure("{% for a in [1] %}" * 30 + "{% endfor %}" * 30).reason == "TEMPLATE_INVALID"


@pytest.mark.parametrize(
    "template",
    [
        "{{ nothing.more }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ '{5}'.format('a') }}",
        "{{ nothing | tojson }}",
        "{{ 'a'.index('b') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'x' %}",
    ],
)
def test_what_goes_wrong_while_rendering_is_a_failure(template: str) -> None:
    assert failure(template).reason == "TEMPLATE_FAILED"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for a in range(100001) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    assert failure(template).reason == "TEMPLATE_FAILED"


@pytest.mark.parametrize("template", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format('') }}"])
def test_what_the_sandbox_hides_is_as_if_it_were_not_there(template: str) -> None:
    assert rendered(template) == ""


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "user", "content": "hello"}]
    failure("{{ messages[0].pop('content') }}")
    assert messages == [{"role": "user", "content": "hello"}]


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(TemplateError("TEMPLATE_FAILED", "why")))
    assert (error.reason, error.message, str(error)) == ("TEMPLATE_FAILED", "why", "why")
