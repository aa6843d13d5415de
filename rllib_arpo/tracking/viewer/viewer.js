"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  // Cividis: lightness grows evenly, and it looks the same to the colour-blind.
  const STOPS = [[0, 34, 78], [49, 68, 107], [102, 105, 112], [149, 143, 120], [203, 186, 105], [254, 232, 56]];
  const ROW = 34, WIDTH = { prompt: 64, model: 124, tool: 96 }, GAP = 20, DECISION_GAP = 74;
  const state = { tree: 0, pane: 0, segment: 0, shown: [] };
  let panes = [];

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString().replace("-", "−"));

  const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−"));
  const signed = (value, digits) => (value > 0 ? `+${fixed(value, digits)}` : fixed(value, digits));
  // What a node has room for: no tags, no line ends.
  const preview = (text) => text.slice(0, 300).replace(/<\/?\w+>/g, " ").replace(/\s+/g, " ").trim().slice(0, 60);

  const all = data.runs.flatMap((run) => run.trees);
  const means = all.flatMap((tree) => tree.segments.map((s) => s.entropy)).filter((h) => h > 0).sort((a, b) => a - b);
  const top = means.length ? means[means.length - 1] : 1;
  const entropic = means.length ? means[Math.floor(means.length * 0.9)] : Infinity;
  const colour = (entropy) => {
    const t = Math.min(Math.sqrt(Math.max(entropy, 0) / top), 1) * (STOPS.length - 1);
    const low = Math.min(Math.floor(t), STOPS.length - 2);
    return STOPS[low].map((c, i) => Math.round(c + (STOPS[low + 1][i] - c) * (t - low)));
  };
  const paint = (element, entropy) => {
    const [r, g, b] = colour(entropy);
    element.style.background = `rgb(${r},${g},${b})`;
    const channel = (c) => ((c / 255 + 0.055) / 1.055) ** 2.4;
    element.style.color = 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b) > 0.18 ? "#000" : "#fff";
  };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const half = (h) => {
    const exponent = (h >> 10) & 31, fraction = h & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    return exponent === 31 ? NaN : h >> 15 ? -size : size;
  };
  const words = (text) => new Uint16Array(bytes(text).buffer);

  const isWrong = (leaf) => ("accuracy" in leaf.parts ? leaf.parts.accuracy : leaf.reward) <= 0;
  const isFailed = (s) => s.call && s.call.status !== "ok";
  const isBranched = (s) => s.branch && s.branch.taken > 0;
  const textOf = (s) => [s.text, s.call && s.call.name, s.call && s.call.arguments].filter(Boolean).join(" ").toLowerCase();

  // Segments that every active filter of a segment's kind keeps; null without any.
  const matches = (tree) => {
    const word = $("search").value.trim().toLowerCase();
    const tests = [];
    const leavesAt = new Map();
    for (const leaf of tree.leaves) leavesAt.set(leaf.segment, [...(leavesAt.get(leaf.segment) || []), leaf]);
    if (word) tests.push((s, i) => (i === 0 ? `${tree.question} ${tree.id}`.toLowerCase().includes(word) : textOf(s).includes(word)) || (leavesAt.get(i) || []).some((l) => (l.answer || "").toLowerCase().includes(word)));
    if ($("wrong").checked) tests.push((s, i) => (leavesAt.get(i) || []).some(isWrong));
    if ($("failed").checked) tests.push(isFailed);
    if ($("branched").checked) tests.push(isBranched);
    if ($("entropic").checked) tests.push((s) => s.entropy >= entropic);
    if (!tests.length) return null;
    const sets = tests.map((test) => tree.segments.flatMap((s, i) => (test(s, i) ? [i] : [])));
    return sets.every((set) => set.length) ? new Set(sets.flat()) : new Set();
  };
  const partner = (tree, run) => run.trees.find((other) => other.id === tree.id);

  const layout = (tree) => {
    const nodes = tree.segments.map((s) => ({ children: [], x: 0, y: 0, gap: GAP, level: 1, segment: s }));
    tree.segments.forEach((s, i) => {
      if (s.parent === null) return;
      const parent = nodes[s.parent];
      parent.children.push(i);
      nodes[i].level = parent.level + 1;
      parent.gap = Math.max(parent.gap, s.branch ? DECISION_GAP : GAP);
    });
    tree.segments.forEach((s, i) => {
      if (s.parent === null) return;
      const parent = nodes[s.parent];
      nodes[i].x = parent.x + WIDTH[parent.segment.role] + parent.gap;
    });
    let row = 0;
    const stack = [0], order = [];
    while (stack.length) {
      const index = stack.pop();
      order.push(index);
      const node = nodes[index];
      const first = node.segment.parent === null || nodes[node.segment.parent].children[0] === index;
      if (!first) row += 1;
      node.y = row;
      for (let c = node.children.length - 1; c >= 0; c -= 1) stack.push(node.children[c]);
    }
    return { nodes, order, rows: row + 1 };
  };

  const label = (s, tree) => {
    if (s.role === "prompt") return `prompt, ${s.n} tokens: ${tree.question}`;
    if (s.role === "tool") return `tool ${s.call ? `${s.call.name}, ${s.call.status}` : ""}: ${s.text}`.slice(0, 200);
    const branch = s.branch ? `, branch wanted ${s.branch.wanted} taken ${s.branch.taken}` : "";
    return `model, entropy ${number(s.entropy)} nats${branch}: ${s.text}`.slice(0, 200);
  };
  const drawNode = (pane, tree, node, index, leaves) => {
    const s = node.segment;
    const element = make("div", undefined, `node ${s.role}`);
    element.id = `node-${pane}-${index}`;
    element.dataset.index = index;
    element.setAttribute("role", "treeitem");
    element.setAttribute("aria-level", node.level);
    element.setAttribute("aria-selected", "false");
    if (node.children.length) element.setAttribute("aria-expanded", "true");
    element.setAttribute("aria-label", label(s, tree) + leaves.map((l) => `; leaf ${l.origin}, reward ${number(l.reward)}, answer ${l.answer}`).join(""));
    Object.assign(element.style, { left: `${node.x + 12}px`, top: `${node.y * ROW + 8}px`, width: `${WIDTH[s.role]}px` });
    element.title = preview(s.role === "prompt" ? tree.question : s.text);
    if (s.role === "model") {
      if (s.entropy !== null && s.entropy !== undefined) paint(element, s.entropy);
      element.append(make("b", fixed(s.entropy)), preview(s.text));
    } else if (s.role === "tool") {
      element.append(make("b", s.call ? `${s.call.status === "ok" ? "✓" : "✗"} ${s.call.name}` : "tool"), s.call && isFailed(s) ? s.call.status : preview(s.text));
      if (isFailed(s)) element.classList.add("bad");
    } else element.textContent = "prompt";
    return element;
  };
  // ΔH above the line into the segment that was measured, P below it.
  const drawDecision = (node) => {
    const { dh, p, wanted, taken } = node.segment.branch;
    const element = make("div", undefined, `decision${taken ? " taken" : ""}`);
    element.setAttribute("aria-hidden", "true");
    element.title = `ΔH ${number(dh)}, P ${number(p)}: ${taken ? "branched" : wanted ? "branch wanted, no budget left" : "no branch"}`;
    element.append(make("span", `ΔH ${signed(dh, 3)}`), make("span", `P ${fixed(p, 3)}`));
    Object.assign(element.style, { left: `${node.x + 12 - DECISION_GAP + 12}px`, top: `${node.y * ROW + 6}px` });
    return element;
  };
  const leafMark = (leaf) => {
    const refill = leaf.origin === "refill" ? " · refill" : "";
    const element = make("span", `${isWrong(leaf) ? "✗" : "✓"} ${leaf.answer === null ? leaf.end.replace("_", " ") : leaf.answer} · ${fixed(leaf.reward)}${refill}`, `leaf ${isWrong(leaf) ? "wrong" : "good"}`);
    element.dataset.index = leaf.segment;
    element.title = ["reward " + number(leaf.reward), ...Object.entries(leaf.parts).map(([name, value]) => `${name} ${number(value)}`), leaf.origin].join(", ");
    element.setAttribute("aria-hidden", "true");
    return element;
  };
  const runName = (run, tree) => (tree && tree.iteration !== undefined ? `${run.name} · iteration ${tree.iteration}` : run.name);
  const draw = (pane, run, tree) => {
    const box = make("section", undefined, "forest");
    const heading = make("h2", tree ? tree.question : "This run has no tree of this task");
    heading.append(make("small", tree ? `${runName(run, tree)} · gold: ${tree.answers.join(" | ")} · ${tree.leaves.filter((l) => !isWrong(l)).length} of ${tree.leaves.length} leaves right` : run.name));
    box.append(heading);
    const scroll = make("div", undefined, "scroll");
    box.append(scroll);
    if (!tree) return { box, tree: null };
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "tree");
    scroll.setAttribute("aria-label", `Tree of ${run.name}`);
    const { nodes, order, rows } = layout(tree);
    const leavesAt = tree.segments.map(() => []);
    tree.leaves.forEach((leaf) => leavesAt[leaf.segment].push(leaf));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("aria-hidden", "true");
    let lines = "", right = 0;
    const parts = document.createDocumentFragment();
    for (const index of order) {
      const node = nodes[index], width = WIDTH[node.segment.role];
      parts.append(drawNode(pane, tree, node, index, leavesAt[index]));
      if (node.segment.branch) parts.append(drawDecision(node));
      for (const child of node.children) {
        const x = node.x + width + 12, y = node.y * ROW + 21, cy = nodes[child].y * ROW + 21, cx = nodes[child].x + 12;
        lines += `M${x} ${y}h9V${cy}H${cx}`;
      }
      leavesAt[index].forEach((leaf, n) => {
        const mark = leafMark(leaf);
        Object.assign(mark.style, { left: `${node.x + width + 20 + n * 220}px`, top: `${node.y * ROW + 8}px` });
        parts.append(mark);
      });
      right = Math.max(right, node.x + width + 24 + 220 * leavesAt[index].length);
    }
    svg.setAttribute("width", right);
    svg.setAttribute("height", rows * ROW + 16);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", lines);
    svg.append(path);
    scroll.append(svg, parts);
    scroll.addEventListener("click", (event) => {
      const hit = event.target.closest(".node");
      if (hit) { state.pane = pane; select(Number(hit.dataset.index)); }
    });
    scroll.addEventListener("focus", () => { if (state.pane !== pane) { state.pane = pane; select(0); } });
    return { box, tree, nodes, order, scroll };
  };

  const table = (rows) => {
    const element = make("table");
    for (const [name, value] of rows) {
      const row = make("tr"), head = make("th", name);
      head.scope = "row";
      row.append(head, make("td", value));
      element.append(row);
    }
    return element;
  };
  const tokens = (s) => {
    const box = make("pre", undefined, "tokens");
    const entropies = Array.from(words(s.entropies), half);
    const pieces = s.pieces ? Array.from(words(s.pieces), (i) => data.pieces[i]) : entropies.map((_, i) => `#${i} `);
    pieces.forEach((piece, i) => {
      if (s.gap && i === s.gap[0]) box.append(make("em", ` […${s.gap[1].toLocaleString("en")} tokens left out…] `));
      const span = make("span", piece);
      if (Number.isFinite(entropies[i])) paint(span, entropies[i]);
      span.title = `${number(entropies[i])} nats`;
      box.append(span);
    });
    return box;
  };
  const detail = () => {
    const { tree, nodes } = panes[state.pane];
    const side = $("detail");
    side.replaceChildren();
    if (!tree) return;
    const s = nodes[state.segment].segment;
    side.append(make("h2", `${s.role} · segment ${state.segment}`));
    if (s.call) {
      const fold = make("details");
      fold.open = true;
      fold.append(make("summary", `${s.call.name}: ${s.call.status}, ${number(s.call.latency * 1000)} ms, attempts ${s.call.attempts}${s.call.truncated ? ", cut" : ""}`), make("h2", "Arguments"), make("pre", s.call.arguments), make("h2", "Result"), make("pre", s.text));
      side.append(fold);
    } else side.append(make("pre", s.role === "prompt" ? s.text || tree.question : s.text));
    tree.leaves.filter((leaf) => leaf.segment === state.segment).forEach((leaf) => side.append(make("h2", "Leaf"), table([["reward", number(leaf.reward)], ...Object.entries(leaf.parts).map(([name, value]) => [`  ${name}`, number(value)]), ["advantage", number(leaf.advantage)], ["origin", leaf.origin], ["end", leaf.end.replace("_", " ")], ["answer", leaf.answer === null ? "none" : leaf.answer]])));
    if (s.branch) side.append(make("h2", "Branch decision"), table([["H / ln V", number(s.branch.h)], ["ΔH / ln V", number(s.branch.dh)], ["P", number(s.branch.p)], ["drawn", number(s.branch.drawn)], ["extra paths wanted", s.branch.wanted], ["extra paths taken", s.branch.taken]]));
    const run = data.runs[state.pane], used = (name) => (run.attribution === name ? " (this run's)" : "");
    const over = run.normalization === "group" ? "leaves of the tree" : "the trees kept here, not the whole batch";
    side.append(make("h2", "Advantage"), table([[`soft${used("soft")}: sum of A > 0`, number(s.plus)], ["sum of A < 0", number(s.minus)], [`hard${used("hard")}: mean`, number(s.hard)]]), make("p", `A = ${run.by_std ? "(reward − mean) / std" : "reward − mean"}, over ${over}.`, "note"));
    side.append(make("h2", "Segment"));
    const rows = [["tokens", s.n], ["paths through it", s.paths]];
    if (s.entropy !== undefined) rows.push(["mean entropy", `${number(s.entropy)} nats`], ["ended by", s.finish], ["weights' version", (s.versions || []).join(", ")]);
    side.append(table(rows));
    if (s.entropies) side.append(make("h2", "Tokens by entropy"), tokens(s));
  };
  const select = (index) => {
    document.querySelectorAll(".node.selected").forEach((old) => { old.classList.remove("selected"); old.setAttribute("aria-selected", "false"); });
    state.segment = index;
    const pane = panes[state.pane];
    if (pane.tree) {
      const element = $(`node-${state.pane}-${index}`);
      element.classList.add("selected");
      element.setAttribute("aria-selected", "true");
      pane.scroll.setAttribute("aria-activedescendant", element.id);
      element.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    detail();
  };
  const mark = () => {
    for (const pane of panes) {
      if (!pane.tree) continue;
      pane.matches = matches(pane.tree);
      pane.scroll.querySelectorAll(".node, .leaf").forEach((node) => node.classList.toggle("off", Boolean(pane.matches) && !pane.matches.has(Number(node.dataset.index))));
    }
  };
  const open = (index, focus) => {
    state.tree = index;
    state.pane = 0;
    const tree = data.runs[0].trees[index];
    panes = data.runs.map((run, pane) => draw(pane, run, pane ? partner(tree, run) : tree));
    $("forests").replaceChildren(...panes.map((pane) => pane.box));
    for (const button of $("list").querySelectorAll("button")) button.setAttribute("aria-current", String(Number(button.dataset.tree) === index));
    mark();
    select(0);
    if (focus) panes[0].scroll.focus({ preventScroll: true });
  };
  const list = () => {
    const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(values.length, 1);
    const trees = data.runs[0].trees.map((tree, index) => ({ tree, index, h: mean(tree.segments.map((s) => s.entropy).filter(Number.isFinite)) }));
    const hit = (tree) => [tree, ...data.runs.slice(1).map((run) => partner(tree, run))].some((one) => one && (matches(one) || { size: 1 }).size);
    const kept = trees.filter(({ tree }) => hit(tree));
    if ($("entropic").checked) kept.sort((a, b) => b.h - a.h);
    state.shown = kept.map(({ index }) => index);
    $("count").textContent = `${kept.length} of ${trees.length} trees`;
    for (const run of data.runs.slice(1)) $("count").append(make("small", `${trees.filter(({ tree }) => partner(tree, run)).length} of them also in ${run.name}`));
    if (data.limit !== null) $("count").append(make("small", `Texts over ${data.limit.toLocaleString("en")} characters lack their middle; a search does not see it.`));
    $("list").replaceChildren(...kept.map(({ tree, index, h }) => {
      const item = make("li"), button = make("button", tree.question);
      button.type = "button";
      button.dataset.tree = index;
      const rewards = tree.leaves.map((l) => l.reward).filter(Number.isFinite);
      button.append(make("small", `${tree.leaves.filter((l) => !isWrong(l)).length} of ${tree.leaves.length} right · entropy ${fixed(h)} nats`));
      button.append(make("small", `reward ${fixed(mean(rewards))} (${fixed(Math.min(...rewards))} to ${fixed(Math.max(...rewards))})`));
      button.setAttribute("aria-current", String(index === state.tree));
      button.addEventListener("click", () => open(index, false));
      item.append(button);
      return item;
    }));
  };
  const refresh = () => {
    list();
    if (state.shown.length && !state.shown.includes(state.tree)) open(state.shown[0], false);
    else mark();
  };
  const step = (by) => {
    const at = state.shown.indexOf(state.tree);
    const next = state.shown[at + by];
    if (next !== undefined) open(next, true);
  };
  const move = (key) => {
    const { nodes, order } = panes[state.pane];
    const node = nodes[state.segment];
    if (key === "ArrowLeft" && node.segment.parent !== null) select(node.segment.parent);
    if (key === "ArrowRight" && node.children.length) select(node.children[0]);
    if (key !== "ArrowUp" && key !== "ArrowDown") return;
    // A sibling, or else the nearest row's segment of the same depth.
    const level = order.filter((i) => nodes[i].level === node.level);
    const next = level[level.indexOf(state.segment) + (key === "ArrowDown" ? 1 : -1)];
    if (next !== undefined) select(next);
  };
  const jump = (by) => {
    const { order, matches: found } = panes[state.pane];
    if (!found || !found.size) return;
    const hits = order.filter((i) => found.has(i) || i === state.segment);
    const next = hits[(hits.indexOf(state.segment) + by + hits.length) % hits.length];
    select(next);
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = event.target === $("search");
    if (typing && (event.key === "Escape" || event.key === "Enter") && panes[state.pane]?.scroll) panes[state.pane].scroll.focus();
    if (typing) return;
    const inTree = !event.target.closest("nav, aside, header");
    if (event.key.startsWith("Arrow")) { if (!inTree || !panes[state.pane]?.tree) return; move(event.key); }
    else if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "n" && panes.length) jump(1);
    else if (event.key === "N" && panes.length) jump(-1);
    else if (event.key === "/") $("search").focus();
    else if (event.key === "?") $("help").showModal();
    else return;
    event.preventDefault();
  });
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("search").addEventListener("input", refresh);
  for (const id of ["wrong", "failed", "branched", "entropic"]) $(id).addEventListener("change", refresh);

  const legend = $("legend"), bar = make("span");
  legend.setAttribute("aria-label", `Colour: mean entropy from 0 (dark) to ${number(top)} nats (light), by square root`);
  for (let i = 0; i <= 5; i += 1) { const box = make("i"); paint(box, top * (i / 5) ** 2); box.title = `${number(top * (i / 5) ** 2)} nats`; bar.append(box); }
  legend.append("mean entropy 0", bar, `${number(top)} nats`);
  for (const alarm of data.alarms) {
    const line = make("p");
    line.append(make("strong", `Alarm ${alarm.name}: `), `${alarm.message} ${alarm.advice}`);
    $("alarms").append(line);
    $("alarms").hidden = false;
  }
  list();
  if (data.runs[0].trees.length) open(0, true);
})();
