"""python -m moe_lm.routes: its tables, its JSON, its page in a browser, and what it refuses."""

import io
import json
import random
import re
import sys

import browser_page
import numpy as np
import pytest
from routed_text import routes_of, tokens_of
from test_report import Page

from moe_lm.config import ConfigError
from moe_lm.routes import tables, texts
from moe_lm.routes.__main__ import main
from moe_lm.routes.classes import CLASSES
from moe_lm.routes.page import MOST_BYTES, page, shown_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
browser = browser_page.browser

HOSTILE = [
    "</pre>",
    "<script>alert(1)</script>",
    "&amp;",
    "\"'",
    "\x00\x1b",
    "\r\n",
    "<!--",
    "日本",
    "",
    "\t",
    "]]>",
    "</script>",
]


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "a <b>.py"
    file.write_text("def main():\n    return 0\n\nthe quick brown fox, 12345 times\n" * 4, "utf-8")
    return file


# The command


def test_tables_fit_100_columns(saved, text_file, capsys):
    main([str(saved / "mixture"), "--text", str(text_file), "--layer", "0", "1"])
    shown = capsys.readouterr().out
    assert "2 layers of 4 experts, 2 per token" in shown
    assert max(len(line) for line in shown.split("\n\n", 1)[1].split("\n")) <= 100
    for heading in (
        "next again",
        "if independent",
        "uniform",
        "Layer 0: experts",
        "Layer 1: pairs",
        "together",
        "indent",
    ):
        assert heading in shown
    assert re.search(r"uniform +2\.00 +3\.00 +3\.50", shown)  # 4 (1 - (1 - 2 / 4)^T)


def test_json_agrees_with_what_was_counted(saved, text_file, capsys):
    main([str(saved / "mixture"), "--text", str(text_file), "--json", "--context", "32", "--max-tokens", "150"])
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens"], told["context"], told["experts"], told["experts_per_token"]) == (150, 32, 4, 2)
    assert sum(told["classes"].values()) == sum(told["positions"].values()) == 150
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    for layer in told["layers"]:
        assert sum(layer["load"]) == pytest.approx(4, abs=1e-3)
        pairs = np.array(layer["pairs"])
        assert pairs.diagonal().sum() == 300
        assert np.array(layer["pairs_if_independent"]).sum() == pytest.approx(pairs.sum() - 300, rel=1e-3)
        assert len(layer["characteristic"]) == 4
        assert 0 < layer["entropy"] <= np.log(4)
        assert set(layer["lift_by_class"]) == set(CLASSES)


def test_one_layer_and_standard_input(saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some words \xff\n" * 9)))
    main([str(saved / "shared"), "--text", "-", "--json", "--layer", "1"])
    told = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in told["layers"]] == [1]
    assert told["text"] == ["standard input"]


def test_the_default_text_is_the_librarys_code(saved, capsys, monkeypatch):
    monkeypatch.setattr(texts, "held_out", lambda source: [f"text of {source}"] * 9)
    main([str(saved / "mixture"), "--max-tokens", "40"])
    assert "40 tokens of python:code in rows of 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("dense", [], r"/dense is a dense model, which routes nothing: name a mixture of experts\."),
        ("mixture", ["--max-tokens", "0"], r"--max-tokens 0 must be greater than 0\."),
        ("mixture", ["--layer", "0", "2"], r"--layer 2 must be between 0 and 1: 2 layers route\."),
        ("mixture", ["--context", "65"], r"--context 65 must be between 2 and 64, "),
        ("mixture", ["--text", "missing.txt"], r"--text missing\.txt cannot be read: No such file or directory\."),
        ("mixture", ["--text", "."], r"--text \. cannot be read: Is a directory\."),
        ("mixture", ["--text", "empty.txt"], r"--text empty\.txt holds no token: name a text"),
        ("mixture", ["--text", "python:rust"], r"data source python:rust is not known"),
        (
            "mixture",
            ["--text", "a.txt", "--html", "missing/x.html"],
            r"--html missing/x\.html cannot be written: ",
        ),
        ("missing", [], r"missing"),
    ],
)
def test_refusals_are_one_sentence(saved, tmp_path, monkeypatch, model, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt").write_text("a", "utf-8")
    with pytest.raises(ConfigError, match=sentence) as refused:
        main([str(saved / model), *arguments])
    assert str(refused.value).count("\n") == 0


# The page


@pytest.fixture(scope="module")
def routes():
    """2 layers of 5 experts: in layer 0 the class of a token chooses, in layer 1 chance."""
    draw = random.Random(0)
    words = [draw.choice(["def", " x", "=", "\n", "    ", "12", *HOSTILE]) for _ in range(300)]
    row = tokens_of(words, [draw.randrange(3) for _ in words])
    layer1 = [draw.sample(range(5), 2) for _ in row]
    return routes_of([row[:200], row[200:]], lambda layer, i: layer1[i] if layer else [i % 3, 4], 2, 5, 2, 256, 250)


def test_the_page_stands_alone_and_text_stays_text(routes):
    html = page("runs/<b>x", "a & <i>title</i>", routes, [0, 1])
    parsed = Page(html)
    own = [attributes for tag, attributes in parsed.elements if tag == "script"]
    assert own == [{"type": "application/json", "id": "data"}, {"type": "module"}]
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"//.*", "", html))
    assert "default-src 'none'" in html
    shown = "".join(token.text for token in routes.head).replace("\r\n", "\n").replace("\x00\x1b", "\ufffd" * 2)
    assert parsed.blocks == [shown]
    assert "first 250 of 300 tokens are shown" in html
    assert not parsed.tags() & {"b", "img", "iframe"}
    names = {name for _, attributes in parsed.elements for name in attributes if name.startswith("on")}
    assert not names


def test_every_color_is_of_both_schemes(routes):
    html = page("x", "", routes, [0, 1])
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    light, dark = (set(re.findall(r"--[a-z0-9]+(?=:)", "".join(blocks[i::2]))) for i in (0, 1))
    assert light == dark
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", html)) <= light


def test_the_data_of_the_page_are_the_choices(routes):
    html = page("x", "", routes, [0])
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert data["rows"] == [200, 50]
    assert data["experts"][0][:4] == [0, 4, *(routes.head_choices[0][0, 1].tolist())]
    assert data["weights"][0][:2] == [67, 33]
    assert [len(row) for row in data["experts"]] == [500, 500]
    labels = [attributes.get("aria-label", "") for _, attributes in Page(html).elements]
    assert sum(label.startswith("layer 0") for label in labels) == 3
    assert any(re.match("Distinct experts.*layer 0 from 2 at tokens 1 to .* at tokens 8", label) for label in labels)


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(60, 256, 8), (3, 8, 1), (1, 4, 4), (3, 16, 2)])
def test_pages_of_other_shapes_stay_small(layers, experts, top_k):
    draw, kept = random.Random(1), shown_tokens(layers, top_k)
    long = "\n" * 60 if experts == 16 else "<\n"  # the dearest character
    rows = [tokens_of([f"w{i}{long}" for i in range(200)], [draw.randrange(9) for _ in range(200)])]
    rows *= 25 if experts == 16 else 3
    given = [draw.sample(range(experts), top_k) for _ in range(200)]
    routes = routes_of(rows, lambda layer, i: given[(i + layer) % 200], layers, experts, top_k, 256, kept)
    assert len(routes.head) == min(kept, routes.tokens)
    html = page("x", "", routes, range(layers))
    Page(html)
    assert len(html.encode()) < MOST_BYTES
    assert ("8 are drawn" in html) == (layers == 60)
    assert ("no pairs" in html) == (top_k == 1)
    assert max(map(len, tables.text("x", routes, [0]).split("\n"))) <= 100
    json.dumps(tables.as_json("x", ["y"], 256, routes, [0]), allow_nan=False)


# In a browser


@pytest.fixture
def shown(browser, routes, tmp_path):
    """A function that opens the page; at the end nothing has failed and nothing was asked for."""
    (tmp_path / "x.html").write_text(page("x", "title", routes, [0, 1]), "utf-8")
    contexts, complaints = [], []

    def watch(request):
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    def go(**options):
        contexts.append(context := browser.new_context(**options))
        opened = context.new_page()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on(
            "request", lambda request: complaints.extend([request.url] * (request.url[:5] not in ("file:", "data:")))
        )
        opened.goto((tmp_path / "x.html").as_uri())
        return opened

    yield go
    for context in contexts:
        context.close()
    assert not complaints


def classes_of(opened):
    return [name.split()[0] for name in opened.eval_on_selector_all("#text span", "all => all.map((n) => n.className)")]


@browser_page.needs_chromium
def test_layers_and_experts_are_switched(shown, routes):
    opened = shown()
    for layer in ("1", "0"):
        opened.select_option("#layer", layer)
        choices = np.concatenate([row[int(layer)] for row in routes.head_choices])
        assert classes_of(opened) == [f"e{first}" for first in choices[:, 0]]
    opened.click("#chips button:nth-child(5)")
    assert set(classes_of(opened)) == {"e4"}  # the second choice of every token
    assert opened.locator("#text span.second").count() == 250
    assert "Expert 4 took 250 of these 250 tokens" in opened.inner_text("#told")
    opened.keyboard.press("Escape")
    assert set(classes_of(opened)) == {"e0", "e1", "e2"}
    assert opened.inner_text("#told") == ""


@browser_page.needs_chromium
def test_a_token_tells_of_every_layer_by_pointer_and_by_keys(shown, routes):
    opened = shown()
    opened.hover("#text span:nth-child(2)")
    first, second = (routes.head_choices[0][layer, 1].tolist() for layer in (0, 1))
    told = [f"layer {i} {a}: 67% {b}: 33%" for i, (a, b) in enumerate((first, second))]
    assert " ".join(opened.inner_text("#detail ol").split()) == " ".join(told)
    opened.focus("#chips button:last-child")
    opened.keyboard.press("Tab")
    for _ in range(3):
        opened.keyboard.press("ArrowRight")
    kind = CLASSES[routes.head[3].kind]
    assert f"{kind}, position 3;" in opened.inner_text("#detail p")
    opened.keyboard.press("Enter")
    assert opened.get_attribute(f"#chips button[data-expert='{routes.head[3].id % 3}']", "aria-pressed") == "true"
    opened.keyboard.press("End")
    assert "position 49;" in opened.inner_text("#detail p")
    assert opened.eval_on_selector_all("#text [tabindex='0']", "all => all.length") == 1


@browser_page.needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_and_can_be_read(shown, width, scheme):
    opened = shown(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    contrast = opened.evaluate("""() => {
      const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (color) => {
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
          .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
      };
      return [...document.querySelectorAll("#chips button")].map((node) => {
        const style = getComputedStyle(node);
        const [a, b] = [light(style.color), light(style.backgroundColor)];
        return Math.max(a, b) / Math.min(a, b);
      });
    }""")
    assert min(contrast) >= 4.5  # WCAG 2.2, 1.4.3
