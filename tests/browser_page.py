"""The server's page in a headless Chromium, for the tests of it: opened, sent to, and answered by a test.

`server_url` is the address of a server with a mixture of experts that wants no key. What the page must show is taken
from the answers that the page itself was given, or that the test asks for; where a server cannot be made to say
something (an error in the middle of an answer, a character in three tokens), the test answers in its place.
"""

import json
import math
import os
import re
import shutil
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PROMPT = "def main("

TEE = """const fetched = window.fetch;
window.fetch = async (...request) => {
  const response = await fetched(...request);
  if (!response.headers.get('content-type')?.startsWith('text/event-stream')) return response;
  const [page, test] = response.body.tee();
  window.received = new Response(test).text().catch(() => '');  // of a stopped answer nothing is wanted
  return new Response(page, response);
};
"""
"""What the page is streamed, kept for the test: Chromium does not keep it, once the page has read it."""

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no Chromium on this machine to show the page in"
)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "CI needs chromium, chromium-browser or google-chrome"
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture
def open_page(browser, server_url):
    """A function that opens the page; at the end no script has failed and no other host was asked for anything."""
    contexts, complaints = [], []

    def complain(message):
        # A request that fails is reported by Chromium itself; the tests that make one fail check what the page says.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def watch(request):
        if not request.url.startswith(server_url.rstrip("/") + "/"):
            complaints.append(f"asked for {request.url}")

    def go(ready=True, before=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(TEE)
        page.set_default_timeout(30_000)
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", watch)
        if before:
            before(page)
        page.goto(server_url)
        if ready:
            expect(page.locator("#shape")).to_contain_text("layers")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(open_page):
    return open_page()


def api(server_url, path, body=None):
    """The server's status and JSON answer, asked without the page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server_url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def set_field(page, name, value):
    page.evaluate("document.getElementById('settings').open = true")
    page.locator(f"#field-{name}").fill(str(value))


def wait_for_end(page):
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#status")).to_contain_text(re.compile("done|stopped|failed"))


def send(page, mode="completion", text=PROMPT, action=None):
    """Sends `text` and waits for the end; the body of the request and the chunks of the answer."""
    with page.expect_request("**/v1/**completions") as request:
        if action:
            action()
        elif mode == "completion":
            page.fill("#prompt", text)
            page.press("#prompt", "Control+Enter")
        else:
            page.click("#tab-chat")
            page.fill("#message", text)
            page.press("#message", "Enter")
    wait_for_end(page)
    lines = page.evaluate("window.received").split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return request.value.post_data_json, [choice for chunk in chunks for choice in chunk.get("choices", ())]


def text_of(choices):
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def tokens_of(choices):
    return [token for choice in choices for token in choice.get("token_details") or []]


def shown(page):
    return page.locator(".answer").last.evaluate("node => node.textContent")


def token(text, data=None, experts=((3, 11), (0, 7)), source="target", probability=0.5):
    data = text.encode() if data is None else data
    entry = {"id": sum(data) + 1, "text": data.decode(errors="replace"), "logprob": math.log(probability)}
    others = [{"id": 9000 + i, "text": other, "logprob": -2.0 - i} for i, other in enumerate((" a", "\n", "<b>x</b>"))]
    return entry | {"bytes": list(data), "source": source, "top": [entry, *others], "experts": list(map(list, experts))}


def event(value):
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def answer_with(page, *steps, reason="stop", end=None):
    """Answers completions of the page with (text, tokens) steps; `end` in place of the usual last events."""
    head = {"id": "cmpl-test", "object": "text_completion", "created": 1, "model": "m", "usage": None}
    chunks = [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "token_details": tokens}
        for text, tokens in steps
    ]
    events = [event(head | {"choices": [chunk]}) for chunk in chunks]
    last = {"index": 0, "text": "", "logprobs": None, "finish_reason": reason}
    events += end or [event(head | {"choices": [last]}), event("[DONE]")]
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body="".join(events)))
