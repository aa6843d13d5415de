/* One question and how its answer came about, as it is streamed.

   All that a server sends is put in as text, never as HTML. */

const STATUS_MARKS = { ok: "✓", error: "✕", unavailable: "✕", timeout: "✕", refused: "✕" };
const MAX_PREVIEW = 200;
const TAG = /(<\/?[A-Za-z_][\w-]*>)/;
const WITHOUT_ANSWER = {
  length: "No answer: the model’s tokens ran out.",
  no_answer: "The model ended without an answer.",
};

/** An element with a class and a text or children. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function seconds(value) {
  return value < 0.01 ? "< 0.01 s" : `${value.toFixed(2)} s`;
}

function pair(name, value) {
  return make("div", "", make("dt", "", name), make("dd", "", value));
}

/** A call of a tool: its name, arguments, status, time and result. */
class ToolView {
  constructor(name, args) {
    this.status = make("span", "badge running", "running");
    this.time = make("span", "num");
    this.body = make("div", "tool-body");
    const summary = make("summary", "", make("span", "label", "Tool call"));
    summary.append(make("code", "name", name), this.status, this.time);
    this.element = make("details", "tool", summary, this.body);
    if (args) this.#show("Arguments", args);
  }

  finish(call) {
    const bad = call.status !== "ok";
    this.status.className = `badge ${bad ? "bad" : "good"}`;
    this.status.textContent = `${STATUS_MARKS[call.status] ?? ""} ${call.status}`.trim();
    this.time.textContent = seconds(call.latency_s);
    this.#show(call.truncated ? "Result, cut" : "Result", call.result);
  }

  halt(word) {
    if (this.time.textContent) return;
    this.status.className = "badge";
    this.status.textContent = word;
  }

  #show(title, text) {
    this.body.append(make("p", "part", title), make("pre", "", text || "(empty)"));
  }
}

/** One turn of the model, foldable. */
class TurnView {
  constructor(number) {
    this.text = "";
    this.touched = false;
    this.state = make("span", "badge running", "writing");
    this.call = make("code", "preview");
    this.numbers = make("span", "numbers");
    this.written = make("pre", "model");
    const title = make("span", "label", `Turn ${number + 1}`);
    const summary = make("summary", "", title, this.state, this.call, this.numbers);
    summary.addEventListener("click", () => (this.touched = true));
    this.body = make("div", "turn-body", make("p", "part", "Model"), this.written);
    this.details = make("details", "turn", summary, this.body);
    this.details.open = true;
    this.element = make("li", "", this.details);
  }

  write(text) {
    this.text += text;
    this.written.append(text);
  }

  startTool(name, args) {
    this.tool = new ToolView(name, args);
    this.call.textContent = args ? `${name}: ${args}` : name;
    this.state.textContent = "calling";
    this.body.append(this.tool.element);
  }

  finishTool(event) {
    if (!this.tool) this.startTool(event.name, event.arguments);
    this.tool.finish(event);
    this.state.className = this.tool.status.className;
    this.state.textContent = this.tool.status.textContent;
  }

  finish(event) {
    const entropy = event.entropy.toFixed(2);
    this.done = true;
    if (!this.tool) {
      this.state.className = "badge";
      this.state.textContent = "wrote";
    }
    for (const text of [
      plural(event.completion_tokens, "token"),
      seconds(event.latency_s),
      `${entropy} nats`,
    ]) {
      this.numbers.append(make("span", "num", text), " ");
    }
    const facts = make("dl", "facts");
    facts.append(
      pair("Read", plural(event.prompt_tokens, "token")),
      pair("Written", plural(event.completion_tokens, "token")),
      pair("Time", seconds(event.latency_s)),
      pair("Entropy", `${entropy} nats per token`),
    );
    this.body.append(facts);
    if (!this.tool) this.call.textContent = this.text.slice(0, MAX_PREVIEW);
    this.#dimTags();
  }

  /** Close it, unless somebody is reading it. */
  fold() {
    if (this.touched || this.details.contains(document.activeElement)) return;
    this.details.open = false;
  }

  halt(word) {
    if (this.done) return;
    this.tool?.halt(word);
    this.state.className = "badge";
    this.state.textContent = word;
  }

  #dimTags() {
    const parts = this.text.split(TAG).filter(Boolean);
    this.written.replaceChildren(
      ...parts.map((part) => (TAG.test(part) ? make("span", "tag", part) : part)),
    );
  }
}

/** A question with its answer; `say` gets what a reader of the screen should hear. */
export class AnswerView {
  constructor(question, number, say) {
    this.say = say;
    this.turns = [];
    this.answer = "";
    this.start = performance.now();
    this.title = make("h2", "asked", question);
    this.thought = make("p", "prose");
    const summary = make("summary", "", make("span", "label", "Thinking"));
    this.thinking = make("details", "thinking", summary, this.thought);
    this.thinking.hidden = true;
    this.list = make("ol", "turns");
    this.result = make("div", "answer");
    this.result.setAttribute("aria-live", "polite");
    this.facts = make("p", "totals");
    this.footer = make("div", "after", this.facts);
    this.element = make("article", "exchange", this.title, this.thinking, this.list);
    this.element.append(this.result, this.footer);
    this.title.id = `asked-${number}`;
    this.element.setAttribute("aria-labelledby", this.title.id);
  }

  /** Take a piece of the stream. */
  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const delta = chunk.choices[0]?.delta;
    if (delta?.reasoning_content) this.#think(delta.reasoning_content);
    if (delta?.content) this.#write(delta.content);
    if (delta?.agent) this.#happen(delta.agent);
  }

  /** The stream is over. */
  finish() {
    const turn = this.turns.at(-1);
    if (this.answer && turn && !turn.tool) turn.state.textContent = "answered";
    if (this.answer) turn?.fold();
    else this.#note(WITHOUT_ANSWER[this.end] ?? "There is no answer.");
    const time = seconds((performance.now() - this.start) / 1000);
    const calls = this.turns.filter((one) => one.tool).length;
    this.facts.textContent = [
      plural(this.turns.length, "turn"),
      plural(calls, "tool call"),
      this.usage && `${this.usage.prompt_tokens} prompt tokens`,
      this.usage && `${this.usage.completion_tokens} written`,
      time,
      this.version && `weights ${this.version}`,
    ]
      .filter(Boolean)
      .join(" · ");
    this.say(this.answer ? `Answered in ${time}.` : "Ended without an answer.");
  }

  /** The answer was given up; `word` says why. */
  halt(word, note) {
    this.turns.at(-1)?.halt(word);
    this.element.classList.add("halted");
    this.#note(note);
  }

  #think(text) {
    this.thinking.hidden &&= !text.trim();
    this.thought.append(text);
  }

  #write(text) {
    if (!this.answer) this.result.append(make("h3", "", "Answer"), make("p", "prose"));
    this.answer += text;
    this.result.lastChild.append(text);
  }

  #note(text) {
    this.element.insertBefore(make("p", "note", text), this.footer);
  }

  #happen(event) {
    const handlers = {
      text: () => this.#turn(event.turn).write(event.text),
      tool_started: () => {
        this.say(`Turn ${event.turn + 1}: calling ${event.name}…`);
        this.#turn(event.turn).startTool(event.name, event.arguments);
      },
      tool_finished: () => this.#turn(event.turn).finishTool(event),
      turn: () => this.#turn(event.turn).finish(event),
      finished: () => {
        this.end = event.end;
        this.version = event.version;
      },
    };
    handlers[event.type]?.();
  }

  #turn(number) {
    while (this.turns.length <= number) {
      this.turns.at(-1)?.fold();
      const turn = new TurnView(this.turns.length);
      this.turns.push(turn);
      this.list.append(turn.element);
      this.say(`Turn ${this.turns.length}: writing…`);
    }
    return this.turns[number];
  }
}
