"""The page of the server: its two modes, its controls, its errors, its looks."""

import json
import re

import browser_page
import pytest
from browser_page import (
    PROMPT,
    answer_with,
    api,
    event,
    send,
    set_field,
    shown,
    text_of,
    token,
    tokens_of,
    wait_for_end,
)
from playwright.sync_api import expect

pytestmark = browser_page.needs_chromium
browser, open_page, page = browser_page.browser, browser_page.open_page, browser_page.page

SETTINGS = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.2,
    "frequency_penalty": -0.3, "max_tokens": 5, "seed": 7, "draft_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_answer_is_the_servers_text(page, server_url, mode):
    set_field(page, "temperature", 0)
    set_field(page, "max_tokens", 24)
    body, choices = send(page, mode)
    assert text_of(choices) == shown(page) != ""
    body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    _, whole = api(server_url, "/v1/completions" if mode == "completion" else "/v1/chat/completions", body)
    choice = whole["choices"][0]
    assert shown(page) == (choice["text"] if mode == "completion" else choice["message"]["content"])
    expect(page.locator("#status")).to_contain_text(f"done: {whole['usage']['completion_tokens']} tokens, ")
    if mode == "completion":
        page.locator("#sheet").click(position={"x": 500, "y": 20})
        expect(page.locator("#prompt")).to_be_focused()
    figures = page.locator(".figures").last
    prompt = f"{whole['usage']['prompt_tokens']} in the prompt"
    for figure in (prompt, "tokens/s", "to the first", choice["finish_reason"]):
        expect(figures).to_contain_text(figure)
    sources = [entry["source"] for entry in tokens_of(choices)]
    guessed = sum(source != "target" for source in sources)
    expect(figures).to_contain_text(f"were accepted guesses ({guessed})")
    shares = [100 * sources.count(source) / len(sources) for source in ("target", "draft", "ngram")]
    assert [int(text[:-1]) for text in page.locator("#legend-source b").all_text_contents()] == [
        pytest.approx(share, abs=0.51) for share in shares
    ]


def test_conversation(page):
    set_field(page, "max_tokens", 6)
    page.click("#tab-chat")
    page.click("#system-box summary")
    page.fill("#system", "Be brief.")
    first, _ = send(page, "chat", "One?")
    answer = shown(page)
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    second, _ = send(page, "chat", "Two?")
    history = [*first["messages"], {"role": "assistant", "content": answer}, {"role": "user", "content": "Two?"}]
    assert second["messages"] == history
    again, choices = send(page, action=lambda: page.click("#regenerate"))
    assert again["messages"] == history
    assert shown(page) == text_of(choices)
    expect(page.locator("#turns > li")).to_have_count(4)
    page.click("#clear")
    expect(page.locator("#turns > li")).to_have_count(0)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop(page, server_url, way):
    _, models = api(server_url, "/v1/models")
    most = models["data"][0]["max_model_len"] // 2
    set_field(page, "max_tokens", most)

    def endless(route):
        """The server's own end of the text could come before the page's."""
        route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})

    page.route("**/v1/completions", endless)
    act = "stop.click()" if way == "button" else "dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    page.evaluate(  # in the page, for a small model is done before the test could click
        f"""() => {{
          const stop = document.getElementById('stop');
          new MutationObserver((_, observer) => {{
            if (!document.querySelector('.answer .t')) return;
            observer.disconnect();
            {act};
          }}).observe(document.getElementById('completion'), {{ childList: true, subtree: true }});
        }}"""
    )
    page.fill("#prompt", PROMPT)
    page.click("#send")
    wait_for_end(page)
    expect(page.locator(".figures")).to_contain_text("ended by: you")
    assert 0 < page.locator(".answer .t").count() < most
    expect(page.locator("#slots li")).to_have_count(0)
    counter = 'moe_lm_requests_finished_total{reason="cancelled"}'
    page.wait_for_function(
        "line => fetch('/metrics').then(answer => answer.text()).then(text => text.includes(line))", arg=counter
    )


def test_settings_arrive(page):
    usual, _ = send(page)
    assert usual.keys() == {"model", "prompt", "temperature", "max_tokens", "stream", "stream_options", "token_details"}
    for name, value in SETTINGS.items():
        set_field(page, name, value)
    page.fill("#field-stop", "\\n\\n\nzz")
    page.select_option("#field-speculation", "none")
    page.select_option("#field-response_format", "json_object")
    page.route("**/v1/completions", lambda route: route.fulfill(status=400, body='{"error": {"message": "No."}}'))
    with page.expect_request("**/v1/completions") as request:
        page.click("#send")
    expect(page.locator("#error")).to_have_text("No.")
    sent = request.value.post_data_json
    settings = SETTINGS | {
        "stop": ["\n\n", "zz"], "speculation": "none", "response_format": {"type": "json_object"},
    }  # fmt: skip
    assert sent == {**usual, **settings}
    page.reload()
    expect(page.locator("#settings-summary")).to_contain_text("top k 40")
    expect(page.locator("#field-stop")).to_have_value("\\n\\n\nzz")
    page.evaluate("document.getElementById('settings').open = true")
    page.click("#defaults")
    expect(page.locator("#settings-summary")).to_have_text("temperature 0.7 · max tokens 200")


def test_curl_is_the_request(page, server_url):
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    set_field(page, "max_tokens", 4)
    body, choices = send(page, text="it's\n")
    page.click(".notes button:text('Copy as curl')")
    command = page.evaluate("window.copied")
    assert f"{server_url.rstrip('/')}/v1/completions" in command
    assert json.loads(re.search(r"-d '(.*)'$", command, re.DOTALL)[1].replace("'\\''", "'")) == body
    page.click(".notes button:text('Copy text')")
    assert page.evaluate("window.copied") == text_of(choices)


def test_error_is_the_servers_sentence(page, server_url):
    set_field(page, "temperature", 77)
    with page.expect_request("**/v1/completions") as request:
        page.click("#send")
    status, answer = api(server_url, "/v1/completions", request.value.post_data_json)
    assert status == 400
    expect(page.get_by_role("alert")).to_have_text(answer["error"]["message"])
    set_field(page, "temperature", 0)
    set_field(page, "max_tokens", 3)
    send(page)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ([event({"error": {"message": "It broke."}}), event("[DONE]")], "It broke."),
        ([event({"choices": []})], "the connection ended before the answer was complete"),
    ],
)
def test_failed_answer_keeps_what_was_written(page, end, sentence):
    answer_with(page, ("so far", [token("so far")]), end=end)
    send(page)
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(page.locator("#status")).to_have_text("failed after 1 tokens")
    assert shown(page) == "so far"


def test_key_is_asked_for(open_page, server_url):
    sent = []

    def lock(page):
        def answer(route):
            sent.append(route.request.headers.get("authorization"))
            if sent[-1] == "Bearer open sesame":
                route.continue_()
            else:
                route.fulfill(status=401, body=json.dumps({"error": {"message": "A key is wanted."}}))

        page.route(re.compile("/status|/v1/"), answer)

    page = open_page(ready=False, before=lock)
    expect(page.get_by_role("alert")).to_have_text("A key is wanted.")
    page.fill("#prompt", PROMPT)
    page.click("#send")
    expect(page.get_by_label("API key")).to_be_focused()
    assert page.get_by_label("API key").get_attribute("type") == "password"
    assert set(sent) == {None}
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert shown(page)
    expect(page.locator("#key-form")).to_be_hidden()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    assert "sesame" in page.evaluate("JSON.stringify(sessionStorage)")


def test_state_of_the_server(page, server_url):
    _, status = api(server_url, "/status")
    slot = {"id": "cmpl-1", "index": 0, "phase": "verify", "tokens": 70, "of": 200, "prompt": 12}
    kv = {"block_size": 16, "blocks": 400, "used": 30, "cached": 100}
    changed = {"state": "draining", "slots": [slot], "running": 1, "waiting": 3, "kv": kv, "acceptance": 0.71}
    page.route("**/status", lambda route: route.fulfill(body=json.dumps(status | changed)))
    expect(page.locator("#server-state")).to_contain_text("The server is ending")
    for text in ("3 waiting", "71%", "30 used, 100 cached, 270 free", "verify 70/200"):
        expect(page.locator("#server")).to_contain_text(text)
    page.unroute("**/status")
    page.route("**/status", lambda route: route.abort())
    expect(page.locator("#server-state")).to_have_text("no answer from the server")
    page.unroute("**/status")
    expect(page.locator("#server-state")).to_have_text("")


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return a ? [r, g, b, a / 255] : [0, 0, 0, 0];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (node) =>
    node ? over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!words && !node.matches('textarea')) continue;
    if (!node.checkVisibility() || node.matches(':disabled, option')) continue;
    const below = behind(node);
    const text = over(rgba(getComputedStyle(node).color), below);
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) low.push(`${node.outerHTML.slice(0, 80)} ${contrast.toFixed(2)}`);
  }
  return low;
}"""


NAMELESS = """() => {
  const wanted = 'button, input, select, textarea, a, summary, fieldset, section, aside, [role=group], [role=tabpanel]';
  const named = (node) => node.getAttribute('aria-label') || node.labels?.length
    || node.querySelector(':scope > legend')
    || document.getElementById(node.getAttribute('aria-labelledby'))
    || (node.matches('button, a, summary') && node.innerText.trim());
  return [...document.querySelectorAll(wanted)].filter((node) => node.checkVisibility() && !named(node))
    .map((node) => node.outerHTML.slice(0, 80));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_fits_and_can_be_read(open_page, scheme, width):
    page = open_page(viewport={"width": width, "height": 740}, color_scheme=scheme, has_touch=True)
    kinds = [(p, source) for p in (0.95, 0.6, 0.3, 0.1, 0.01) for source in ("target", "draft", "ngram")]
    entries = [token(" word", probability=p, source=source) for p, source in kinds]
    answer_with(page, (" word" * 15, entries), ("x" * 300, [token("x" * 300)]))
    send(page)
    page.locator(".answer .t").nth(3).tap()
    page.evaluate("document.getElementById('settings').open = true")
    for colour in ("source", "probability", "off"):
        page.check(f"input[value={colour}]")
        assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.getElementById('close').click()")
    page.click("#tab-chat")
    page.click("#theme")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []


def test_everything_has_a_name(page):
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    set_field(page, "max_tokens", 4)
    send(page)
    for mode in ("completion", "chat"):
        page.click(f"#tab-{mode}")
        nameless = page.evaluate(NAMELESS)
        assert nameless == []
    assert page.locator("main, aside, header, h1").count() == 4
    assert page.evaluate("document.documentElement.lang") == "en"
    page.click("#tab-chat")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="Completion")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel")).to_have_attribute("id", "completion")
