"""Chat templates as models bring them, and one that uses all of the language; conversations for them."""

from typing import Any

from attnzoo.tokenizer.chat import ChatTemplate

CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}

{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

INST = """{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set text = system + turn.content if loop.first else turn.content -%}
    {%- if turn.role == 'user' -%}
        {{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + text.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

CONTROLS = """{%- macro block(name, text='') -%}
<{{ name }}>{{ text | replace('\\n', ' ') | indent(2) }}{{ caller() if caller is defined else '' }}</{{ name }}>
{%- endmacro -%}
{%- set ns = namespace(system='', count=0, names=[]) -%}
{% for message in messages %}
    {% if message.role == 'system' %}{% set ns.system = ns.system ~ message.content %}{% continue %}{% endif %}
    {% if ns.count >= 2 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% set ns.names = ns.names + [message.role] %}
    {% generation %}
    {{ loop.index }}/{{ loop.length }} {{ message | tojson }} {{ {'<&>': [1, none, true]} | tojson(indent=2) }}
    {% endgeneration %}
    {{ block(message['role'] | upper, message.content) }}
{% endfor %}
{% call block('body') %}{{ ns.names | join(',') }}{% endcall %}
{% set captured %}{{ '%s is %05.1f' % ('pi', 3.14159) }}, {{ '{:>6}|{}'.format('a', ns.count) }}{% endset %}
{{ captured }}{{ ns.system | default('none', true) }}
{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content }}
{{ messages | map(attribute='role') | unique | list }}{{ dict(a=1, **{'b': 2}) | dictsort }}{{ '<b>' | safe + '<i>' }}
{{ undefined_name }}{{ messages[0].absent }}{{ strftime_now('%Y') }}
{{ 2 ** 10 // 3 }}{{ 'a,b'.split(',')[-1].rjust(4, '.') }}
"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b> & 'you' \n zwei; 数据 🙂 "}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\n\tfour"},
    ],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ],
]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages: list[dict[str, Any]] = CONVERSATIONS[0], **options: Any) -> str:
    """What a template makes of a conversation, with the special tokens of `SPECIAL`."""
    return ChatTemplate(source, special=SPECIAL).render(messages, **options)
