"""Chat templates beside those of transformers, and conversations."""
import io
import json
import sys

import numpy as np
import pytest
from conftest import reference
from tiny import command, make_tokenizer, refused

import generate
from console import chat
from extras import quantize
from nanollm import Config, NanoLLM
from storage import checkpoint, huggingface
from storage.tokens import load_tokenizer

jinja2 = reference("jinja2")
CHATML = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{% for message in messages %}
    {%- if message.content == "skip" %}{%- continue %}{%- endif %}
    {{- '[' + message['role'] + '] ' + message['content'] | trim + eos_token }}
    {% if tools is defined and tools %}{{ tools | tojson }}{% endif %}
{% endfor %}
{{ {"é": messages[0]} | tojson(indent=1) }}
"""
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
    {{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ raise_exception('no system') if m.role == 'system' }}<u> {{ m.content }}
{% endif %}{% endfor %}"""
SAID = [{"role": "user", "content": " who ran? "}, {"role": "assistant", "content": "a dog <&> é"},
        {"role": "user", "content": "skip"}]


@pytest.fixture
def folder(tmp_path):
    """A chat model's: <|im_end|> ends an answer, which only tokenizer_config.json says."""
    NanoLLM(Config(300, 16, 1, 2, 2, 64, 24)).save(tmp_path)
    make_tokenizer(tmp_path / "tokenizer.json", 300, ["<|im_start|>", "<|im_end|>", "<s>"])
    about(tmp_path, chat_template=CHATML)
    return tmp_path


def about(folder, **settings):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"__type": "AddedToken", "content": "<s>"},
                "eos_token": "<|im_end|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA, MARKED])
def test_a_conversation_is_written_as_transformers_writes_it(folder, template, own_file):
    transformers = reference("transformers")
    if own_file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    about(folder, chat_template="another" if own_file else template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for n in (1, 3):
        expected = theirs.apply_chat_template(SAID[:n], tokenize=False, add_generation_prompt=True)
        assert "who ran?" in expected and chat.Template(folder).render(SAID[:n]) == expected


def test_of_several_templates_the_default_is_taken(folder):
    transformers, named = reference("transformers"), [{"name": "tool_use", "template": "x"},
                                                      {"name": "default", "template": CHATML}]
    about(folder, chat_template=named)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(SAID, tokenize=False, add_generation_prompt=True)
    assert "who ran?" in expected and chat.Template(folder).render(SAID) == expected
    about(folder, chat_template=named[:1])
    refused(lambda: chat.Template(folder), "tokenizer_config.json", "tool_use", "default", "chat_template.jinja")


@pytest.mark.parametrize("own_file", [False, True])
def test_a_model_made_of_a_chat_model_is_one(folder, tmp_path, own_file):
    """By training that starts from it, and by quantising it."""
    if own_file:
        (folder / "chat_template.jinja").write_text(MARKED)
    model, tokenizer, expected = *generate.open_model(folder)[:2], chat.Template(folder).render(SAID)
    (tmp_path / "tuned").mkdir()
    checkpoint.Run(tmp_path, huggingface.tokenizer_files(tokenizer, {}, 64, folder), {}, {}).write_model(
        tmp_path / "tuned", model)
    quantize.write(tmp_path / "small", tmp_path / "tuned", model, 8)
    for name in ("tuned", "small"):
        assert chat.Template(tmp_path / name).render(SAID) == expected


def test_the_prompt_then_each_line_is_answered(folder, monkeypatch):
    tokenizer, read = load_tokenizer(folder / "tokenizer.json"), []
    cat, end, mat = (tokenizer.encode(word).ids for word in ("the cat.", "<|im_end|>", " no dog"))

    def scripted(self, ids, count, temperature, top_k, top_p, seed, stop_ids):
        assert (count, temperature, stop_ids) == (7, 0, end)
        read.append(tokenizer.decode(ids[0], skip_special_tokens=False))
        return iter([np.array([token]) for token in (cat + end + mat, mat + cat)[len(read) - 1]])
    monkeypatch.setattr(NanoLLM, "generate", scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n and now? \n"))
    flags = "--chat", "--prompt", "who?", "--max-new-tokens", 7, "--temperature", 0, "--stop", " cat"
    assert command(generate.main, folder, *flags)[:2] == (0, "the\n no dogthe\n")
    first = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    assert read == [first, f"{first}the<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"]


def test_a_real_conversation_ends_with_stdin(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe mat"))
    code, out, err = command(generate.main, folder, "--chat", "--max-new-tokens", 3)
    assert (code, err) == (0, "") and out.count("\n") >= 2


@pytest.mark.parametrize("template, words", [
    (None, ["no chat template"]), ("{% if %}", ["tokenizer_config.json", "not a chat template"]),
    ("{{ raise_exception('never') }}", ["tokenizer_config.json", "never"]), ("{{ 1 / 0 }}", ["tokenizer_config.json"]),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ["tokenizer_config.json", "unsafe"]),
])
def test_templates_that_cannot_be_used_are_named(folder, template, words):
    about(folder, chat_template=template)
    code, out, err = command(generate.main, folder, "--chat", "--prompt", "a", name="generate.py")
    assert (code, out, err.count("\n")) == (2, "", 1) and all(word in err for word in words), err


def test_without_jinja2_and_with_samples(folder, monkeypatch):
    code, _, err = command(generate.main, folder, "--chat", "--num-samples", 2, name="generate.py")
    assert (code, err) == (2, "generate.py: --chat gives one answer: leave out --num-samples\n")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(lambda: chat.Template(folder), "jinja2", "pip install jinja2")
