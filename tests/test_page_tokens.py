"""The page of the server: the tokens of an answer, what it tells of each, and that they spell the server's text."""

import json
import math

import browser_page
from browser_page import PROMPT, answer_with, api, send, set_field, shown, token, tokens_of
from playwright.sync_api import expect

pytestmark = browser_page.needs_chromium
browser, open_page, page = browser_page.browser, browser_page.open_page, browser_page.page


def check_panel(page, entry, num_experts):
    panel = page.locator("#token")
    expect(panel).to_contain_text(f"id {entry['id']} ")
    expect(panel.locator(".odds")).to_contain_text(f"{100 * math.exp(entry['logprob']):.1f}% likely")
    expect(panel.locator("[data-source]")).to_have_attribute("data-source", entry["source"])
    rows = panel.locator(".bars li")
    for i, other in enumerate(entry["top"]):
        expect(rows.nth(i).locator(".share")).to_have_text(f"{100 * math.exp(other['logprob']):.1f}%")
    chosen = panel.locator(".bars .chosen .share").all_text_contents()
    assert chosen == [f"{100 * math.exp(entry['logprob']):.1f}%"] * len(chosen) != []
    labels = [f"layer {i}: experts {', '.join(map(str, experts))}" for i, experts in enumerate(entry["experts"])]
    assert panel.locator(".layer > span:first-child").all_text_contents() == labels
    for i, experts in enumerate(entry["experts"]):
        cells = panel.locator(".layer").nth(i).locator(".strip i").evaluate_all("all => all.map(c => c.className)")
        assert cells == ["used" if expert in experts else "" for expert in range(num_experts)]


def test_hover_shows_the_token(page, server_url):
    _, status = api(server_url, "/status")
    set_field(page, "temperature", 0)
    set_field(page, "max_tokens", 12)
    _, choices = send(page)
    tokens = page.locator(".answer .t")
    details = tokens_of(choices)
    assert len(details) == tokens.count(), "this continuation has no character in several tokens"
    visible = [i for i, entry in enumerate(details) if entry["text"].strip()]
    for place in visible[:4]:
        tokens.nth(place).hover()
        check_panel(page, details[place], status["num_experts"])
    tokens.nth(visible[0]).click()
    expect(page.locator("#inspector-title")).to_have_text("Token, pinned")
    tokens.nth(visible[1]).hover()
    expect(page.locator("#token")).to_contain_text(f"{visible[0] + 1} of {len(details)} ")


def test_keyboard_walks_through_tokens(page):
    entries = [token(text) for text in ("one", " two", "\n", "three")]
    answer_with(page, *((entry["text"], [entry]) for entry in entries))
    send(page)
    tokens = page.locator(".answer .t")
    assert tokens.evaluate_all("all => all.map(node => node.tabIndex)") == [0, -1, -1, -1]
    page.focus("#prompt")
    page.keyboard.press("Tab")
    steps = (("Right", 1), ("Right", 2), ("Left", 1), ("Down", 3), ("Home", 0), ("End", 3))
    for key, place in steps:
        page.keyboard.press(key if key in ("Home", "End") else f"Arrow{key}")
        expect(tokens.nth(place)).to_be_focused()
        assert tokens.evaluate_all("all => all.filter(node => node.tabIndex === 0).length") == 1
        expect(page.locator("#token")).to_contain_text(f"{place + 1} of 4 ")
    expect(tokens.nth(3)).to_have_attribute("role", "button")
    described = page.locator("#" + tokens.nth(3).get_attribute("aria-describedby"))
    expect(described).to_contain_text("50% likely; source target")
    expect(described).to_contain_text("layer 0: experts 3, 11")
    page.keyboard.press("ArrowLeft")
    expect(tokens.nth(2)).to_have_attribute("aria-label", "line break")
    page.keyboard.press("Enter")
    expect(tokens.nth(2)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect(tokens.nth(2)).to_have_attribute("aria-pressed", "false")
    read_aloud = page.locator(":is([aria-live], [role=status], [role=alert]):is(.answer *, :has(.t))")
    assert read_aloud.count() == 0, "each token would be"


def test_load_of_the_experts(page, server_url):
    _, status = api(server_url, "/status")
    set_field(page, "max_tokens", 12)
    _, choices = send(page)
    details = tokens_of(choices)
    for layer in range(status["num_hidden_layers"]):
        for expert in range(status["num_experts"]):
            count = sum(expert in entry["experts"][layer] for entry in details)
            name = f"layer {layer}, expert {expert}: {count} of {len(details)} tokens"
            expect(page.get_by_role("button", name=name, exact=True)).to_have_count(1)
    answer_with(page, ("ab", [token("a", experts=[[0, 1]]), token("b", experts=[[1, 2]])]))
    send(page)
    for expert, lit in ((0, ["a"]), (1, ["a", "b"]), (2, ["b"])):
        page.locator("#load-strips button").nth(expert).hover()
        assert page.locator(".answer .lit").all_text_contents() == lit


def test_dense_model_has_no_experts(open_page, server_url):
    _, status = api(server_url, "/status")
    dense = json.dumps(status | {"num_experts": 0, "num_experts_per_tok": 0})
    page = open_page(before=lambda page: page.route("**/status", lambda route: route.fulfill(body=dense)))
    expect(page.locator("#shape")).to_contain_text("dense")
    answer_with(page, ("a", [token("a", experts=[])]))
    send(page)
    page.locator(".answer .t").click()
    expect(page.locator("#token")).to_contain_text("50.0% likely")
    expect(page.locator("#token .strip, #load:visible")).to_have_count(0)


def test_text_is_never_markup(page):
    evil = "<img src=x onerror=\"document.title='owned'\">"
    answer_with(page, (evil, [token(evil)]), (evil, []))
    error = json.dumps({"error": {"message": evil}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=error))
    send(page, text=evil)
    assert shown(page) == evil * 2
    page.locator(".answer .t").first.click()
    expect(page.locator("#token")).to_contain_text("<img")
    page.click("#tab-chat")
    page.fill("#message", evil)
    page.click("#send")
    expect(page.get_by_role("alert")).to_have_text(evil)
    assert page.locator("main img, aside img, #turns b").count() == 0
    assert page.title() != "owned"


def test_characters_split_over_tokens(page):
    pieces = [b"na", b"\xc3", b"\xaf", b"ve \xf0\x9f", b"\x99", b"\x82\xe2", b"\x82\xac", b"!"]
    texts = ["na", "", "ï", "ve ", "", "🙂", "€", "!"]
    answer_with(page, *((text, [token("", piece)]) for text, piece in zip(texts, pieces, strict=True)))
    send(page)
    assert shown(page) == "naïve 🙂€!"
    assert page.locator(".answer .t").all_text_contents() == ["na", "ï", "ve 🙂€", "!"]
    page.locator(".answer .t").nth(2).click()
    expect(page.locator("#token")).to_contain_text("4 tokens that share characters")
    expect(page.locator("#token .odds")).to_have_count(4)


def test_tokens_beyond_the_text(page):
    """A stop string in the middle of a token, and an end token: seen, and no part of the text."""
    texts = ["ab", "cST", "OP", "<|end|>"]
    answer_with(page, ("ab", [token(texts[0])]), ("c", [token(text) for text in texts[1:]]))
    send(page)
    assert shown(page) == "abc"
    assert page.locator(".answer .t").all_text_contents() == ["ab", "c", "", ""]
    beyond = page.locator(".answer .t").evaluate_all("all => all.map(node => node.dataset.beyond)")
    assert beyond == [None, "ST", "OP", "<|end|>"]
    page.click("#take")
    expect(page.locator("#prompt")).to_have_value(f"{PROMPT}abc")


def test_text_that_no_token_explains(page):
    """Whatever the tokens spell, the text is shown, all of it and nothing else."""
    answer_with(page, ("Hello", [token(" Hello")]), (" wor", [token(" xyz")]), ("ld", []), ("", [token("!")]))
    send(page)
    assert shown(page) == "Hello world"


def test_nothing_is_rendered_twice(page):
    """What a long answer costs: each token is one node, added once."""
    page.evaluate(
        """() => {
          window.counts = { added: 0, removed: 0 };
          new MutationObserver((records) => {
            for (const { addedNodes, removedNodes } of records) {
              counts.added += [...addedNodes].filter((node) => node.matches?.('.t')).length;
              counts.removed += [...removedNodes].filter((node) => node.matches?.('.t')).length;
            }
          }).observe(document.getElementById('completion'), { childList: true, subtree: true });
        }"""
    )
    answer_with(page, *((f" w{i}", [token(f" w{i}")]) for i in range(2000)))
    send(page)
    assert page.evaluate("window.counts") == {"added": 2000, "removed": 0}
