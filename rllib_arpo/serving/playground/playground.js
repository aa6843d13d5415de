/* The page: a conversation with one of the models that the server has.

   The key is kept in sessionStorage and nowhere else. An answer that was stopped or
   failed is no part of the conversation: its question goes back into the box. */

import { AnswerView, make } from "./answer.js";
import { RequestError, curlOf, listModels, streamAnswer } from "./requests.js";

const KEY = "rllib_arpo.api_key";
const COPY = "Copy as curl";
const WIDE = "(min-width: 56rem)";

const at = (id) => document.getElementById(id);
const [form, question, status, error] = ["ask", "question", "status", "error"].map(at);
const [send, stop, anew, model] = ["send", "stop", "new", "model"].map(at);

/** What the next request goes on with, and what goes on now. */
const talk = { messages: [], count: 0, tokens: 0, running: null };

const keyNow = () => sessionStorage.getItem(KEY) ?? "";
const say = (text) => (status.textContent = text);
const fail = (text) => (error.textContent = text);

// ------------------------------------------------------------------ request

function requestOf(text) {
  const system = at("system").value.trim();
  const request = {
    model: model.value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...talk.messages,
      { role: "user", content: text },
    ],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const [name, id] of [
    ["temperature", "temperature"],
    ["max_tokens", "max-tokens"],
    ["seed", "seed"],
  ]) {
    if (at(id).value !== "") request[name] = at(id).valueAsNumber;
  }
  return request;
}

/** The question, or null after saying what is missing. */
async function questionNow() {
  fail("");
  if (!model.value) await loadModels();
  if (!model.value) return null;
  if (question.value.trim()) return question.value.trim();
  say("Write a question first.");
  question.focus();
  return null;
}

async function loadModels() {
  try {
    const names = await listModels(keyNow());
    model.replaceChildren(...names.map((name) => new Option(name, name)));
    at("key-form").hidden = !keyNow();
    return true;
  } catch (reason) {
    report(reason);
    return false;
  }
}

function report(reason) {
  if (reason instanceof RequestError && reason.status === 401) {
    at("key-form").hidden = false;
    at("key").focus();
    fail(keyNow() ? reason.message : "This server asks for an API key.");
  } else {
    fail(reason.message);
  }
}

// --------------------------------------------------------------------- ask

async function ask() {
  if (talk.running) {
    say("Still answering. Esc stops it.");
    return;
  }
  // Claimed before anything is waited for, so a second Ask cannot start, too.
  const run = { controller: new AbortController() };
  begin(run);
  try {
    const text = await questionNow();
    if (text !== null) await answer(text, run);
  } finally {
    if (talk.running === run) end();
  }
}

async function answer(text, run) {
  const request = requestOf(text);
  const view = new AnswerView(text, talk.count++, say);
  at("empty").hidden = true;
  anew.hidden = false;
  at("conversation").append(view.element);
  question.value = "";
  say("Asking…");
  follow(true);
  const { signal } = run.controller;
  try {
    for await (const chunk of streamAnswer(request, keyNow(), signal)) {
      view.add(chunk);
      follow();
    }
    signal.throwIfAborted();
    view.finish();
    talk.messages = [
      ...talk.messages,
      { role: "user", content: text },
      { role: "assistant", content: view.answer },
    ];
    count(view.usage);
  } catch (reason) {
    giveUp(view, text, signal.aborted ? null : reason);
  }
  view.footer.append(copyButton(request, Boolean(keyNow())));
  follow();
}

/** Show that there is no answer; `reason` is null when the user stopped it. */
function giveUp(view, text, reason) {
  if (!view.element.isConnected) return;
  const word = reason ? "failed" : "stopped";
  view.halt(word, `${reason ? "Failed" : "Stopped"}. Not part of the conversation.`);
  if (!question.value) question.value = text;
  say(reason ? "Failed. The question is back in the box." : "Stopped.");
  if (reason) report(reason);
}

function begin(run) {
  const moved = document.activeElement === send;
  talk.running = run;
  document.body.classList.add("running");
  send.hidden = true;
  stop.hidden = false;
  if (moved) stop.focus();
}

function end() {
  const moved = document.activeElement === stop;
  talk.running = null;
  document.body.classList.remove("running");
  send.hidden = false;
  stop.hidden = true;
  if (moved) question.focus();
}

function count(usage) {
  talk.tokens += usage?.total_tokens ?? 0;
  const asked = talk.messages.length / 2;
  at("totals").textContent =
    `${asked} question${asked === 1 ? "" : "s"} · ${talk.tokens} tokens`;
}

function startAnew() {
  talk.running?.controller.abort();
  if (talk.running) end();
  Object.assign(talk, { messages: [], tokens: 0 });
  for (const view of [...at("conversation").querySelectorAll(".exchange")]) view.remove();
  at("empty").hidden = false;
  at("totals").textContent = "";
  anew.hidden = true;
  fail("");
  say("New conversation.");
  question.focus();
}

// ------------------------------------------------------------ copy and scroll

function copyButton(request, withKey) {
  const button = make("button", "quiet", COPY);
  button.type = "button";
  button.addEventListener("click", () => copy(request, withKey));
  return button;
}

async function copy(request, withKey) {
  const text = curlOf(request, withKey);
  // Pages that are neither https nor loopback have no clipboard.
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyBySelection(text);
  say(withKey ? "Copied. The key is read from $RLLIB_ARPO_API_KEY." : "Copied.");
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const box = make("textarea", "hidden", text);
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
  focused?.focus();
}

let pinned = true;

/** Keep the end in sight, unless the reader has scrolled away from it. */
function follow(always = false) {
  pinned ||= always;
  requestAnimationFrame(() => {
    if (pinned) scrollTo(0, document.documentElement.scrollHeight);
  });
}

// ------------------------------------------------------------------- wiring

addEventListener("scroll", () => {
  pinned = innerHeight + scrollY >= document.documentElement.scrollHeight - 48;
});
// Whoever unfolds a turn wants to read it.
at("conversation").addEventListener("click", () => (pinned = false));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") talk.running?.controller.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
stop.addEventListener("click", () => talk.running?.controller.abort());
anew.addEventListener("click", startAnew);
at("curl").addEventListener("click", async () => {
  const text = await questionNow();
  if (text !== null) await copy(requestOf(text), Boolean(keyNow()));
});
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  fail("");
  if (await loadModels()) {
    at("key").value = "";
    say("Key accepted.");
    question.focus();
  }
});
// A field that is refused must be in sight to be pointed at.
at("settings").addEventListener("invalid", () => (at("settings").open = true), true);
// Where there is room, the settings start unfolded.
at("settings").open = matchMedia(WIDE).matches;
loadModels();
