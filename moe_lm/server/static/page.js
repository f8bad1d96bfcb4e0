// The page: two modes, one answer at a time, and what the other files make of it.

import { Answer, withCopying } from "./answer.js";
import { ApiError, curl, getJson, stream, useKey } from "./api.js";
import { Batch } from "./batch.js";
import { byId, oncePerFrame } from "./dom.js";
import { Inspector } from "./inspector.js";
import { showShares } from "./legend.js";
import { Load } from "./load.js";
import { Chat, Completion } from "./modes.js";
import { buildSettings, chosenSettings, offerSpeculations } from "./settings.js";

const inspector = new Inspector((answer) => look(answer));
const load = new Load();
const batch = new Batch({ status: learn, refused: askForKey });
const modes = { completion: new Completion(), chat: new Chat() };
let mode = modes.completion;
let status = null;
let looked = null;
let running = null;
let afterKey = null;

/** Shows what is counted over `answer`, which is looked at from now on. */
function look(answer) {
  looked = answer;
  inspector.tidy();
  showShares(answer);
  load.show(answer, status);
}

/** What /status says; of a model that is new here, also how long its context is. */
async function learn(answer) {
  if (status?.model === answer.model) {
    status = answer;
    return;
  }
  const { data } = await getJson("/v1/models", 5);
  status = answer;
  const { num_hidden_layers: layers, num_experts: experts, num_experts_per_tok: used, draft, model } = status;
  const length = data.find((entry) => entry.id === model)?.max_model_len;
  inspector.numExperts = experts;
  offerSpeculations(status);
  document.title = `${model}: moe-lm`;
  byId("model").textContent = model;
  byId("shape").textContent = [
    `${layers} layers`, experts ? `${experts} experts, ${used} per token` : "dense", draft ? "a draft model" : "no draft model",
    length && `a context of ${length.toLocaleString("en")} tokens`,
  ].filter(Boolean).join(" · ");
}

/** The request that the mode would send now. */
function requestOf(what) {
  const body = { model: status?.model, ...what.body, ...chosenSettings(), stream: true,
    stream_options: { include_usage: true }, token_details: true };
  return { path: what.path, body };
}

/** Sends what is written, or the last request `again`, and shows the answer as it comes. */
async function generate(again = false) {
  if (running) return;
  showError(null);
  const own = mode;
  running = new AbortController();
  const { signal } = running;
  showButtons();
  let answer = null;
  try {
    if (!status) await learn(await getJson("/status", 5));
    const room = own.start(again);
    if (room) {
      answer = new Answer({ ...room, ...requestOf(room), changed: (one) => one === looked && look(one) });
      own.answer = answer;
      inspector.watch(answer);
      look(answer);
      byId("status").textContent = "writing";
      await receive(answer, signal);
      answer.finish("stop");
    }
  } catch (error) {
    answer?.finish(signal.aborted ? "stopped" : "error");
    if (!signal.aborted) fail(error, answer ? true : again);
  }
  running = null;
  byId("status").textContent = answer?.summary ?? "";
  if (answer) own.end(answer);
  showButtons();
  follow();
}

async function receive(answer, signal) {
  let id = null;
  try {
    for await (const chunk of stream(answer.path, answer.body, signal)) {
      if (!id) batch.mine.add((id = chunk.id));
      answer.add(chunk);
      follow();
    }
  } finally {
    batch.mine.delete(id);
  }
}

function fail(error, again) {
  if (error.status === 401) {
    askForKey(error);
    afterKey = () => generate(again);
    byId("key").focus();
  } else {
    showError(error.message);
    if (!(error instanceof ApiError)) console.error(error);
  }
}

function showError(text) {
  byId("error").textContent = text ?? "";
  byId("error").hidden = !text;
}

function askForKey(error) {
  showError(error.message);
  byId("key-form").hidden = false;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  showError(null);
  batch.ask();
  afterKey?.();
  afterKey = null;
});

// A reader who is at the end of the text stays there while it grows; one who scrolled up is left in peace.
let atEnd = true;
addEventListener("scroll", () => {
  atEnd = beyondView() < 60;
}, { passive: true });
const beyondView = () => byId("main").getBoundingClientRect().bottom - innerHeight;
const follow = oncePerFrame(() => {
  if (atEnd && beyondView() > 0) scrollBy({ top: beyondView(), behavior: "instant" });
});

function showButtons() {
  const chat = mode === modes.chat;
  byId("send").textContent = chat ? "Send" : "Continue";
  // They share a place, and the focus where one had it.
  const [shown, gone] = running ? ["stop", "send"] : ["send", "stop"];
  const focused = document.activeElement === byId(gone);
  byId(gone).hidden = true;
  byId(shown).hidden = false;
  if (focused) byId(shown).focus();
  byId("take").hidden = chat || Boolean(running) || !mode.answer?.text;
  byId("regenerate").hidden = !chat || Boolean(running) || mode.empty;
  byId("clear").disabled = Boolean(running) || mode.empty;
}

function choose(name) {
  mode = modes[name];
  document.body.dataset.mode = name;
  for (const key of Object.keys(modes)) {
    const tab = byId(`tab-${key}`);
    tab.setAttribute("aria-selected", String(key === name));
    tab.tabIndex = key === name ? 0 : -1;
    byId(key).hidden = key !== name;
  }
  byId("message-row").hidden = name !== "chat";
  showButtons();
  look(mode.answer);
}

const tabs = Object.keys(modes).map((name) => byId(`tab-${name}`));
for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab.id.slice("tab-".length)));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs.at((tabs.indexOf(tab) + move) % tabs.length);
    next.focus();
    next.click();
  });
}

byId("send").addEventListener("click", () => generate());
byId("regenerate").addEventListener("click", () => generate(true));
byId("stop").addEventListener("click", () => running?.abort());
byId("take").addEventListener("click", () => {
  modes.completion.take();
  forget();
});
byId("clear").addEventListener("click", () => {
  mode.clear();
  forget();
});
withCopying(byId("curl"), () => {
  const { path, body } = requestOf(mode.next());
  return curl(path, body);
});

function forget() {
  load.release();
  look(null);
  showError(null);
  byId("status").textContent = "";
  showButtons();
}

// In a prompt Enter is a line break, in a chat it sends.
byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
  event.preventDefault();
  generate();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) running.abort();
    else if (!inspector.release()) load.release();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
byId("prompt").addEventListener("input", showButtons);

byId("colouring").addEventListener("change", (event) => {
  document.body.dataset.colour = event.target.value;
  localStorage.setItem("moe-lm colour", event.target.value);
});
const colour = localStorage.getItem("moe-lm colour");
for (const radio of document.getElementsByName("colour")) {
  if (radio.value === colour) radio.click();
}

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("moe-lm theme", theme);
}
setTheme(THEMES.includes(localStorage.getItem("moe-lm theme")) ? localStorage.getItem("moe-lm theme") : "auto");
byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});

buildSettings();
choose("completion");
batch.ask();
