// The page: which call, prompt and round are looked at, and what is shown of them.

const { calls } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const THEMES = [["light dark", "Colours: system"], ["light", "Colours: light"], ["dark", "Colours: dark"]];
const SECONDS_A_ROUND = 1.1;

let call = calls[0];
let rowIndex = 0;
let rounds = []; // those in which the chosen prompt has a part: [round, row]
let chosen = 0;
let numbers = "draft";
let theme = 0;
let playing = null;

function openCall(index) {
  call = calls[index];
  $("pair").textContent = `${call.drafter} drafts for ${call.target}, ${call.sampled ? "sampled" : "greedy"}, on ${call.device}`;
  $("row-choice").hidden = call.rows.length === 1;
  $("row").replaceChildren(...call.rows.map((row, number) => make("option", { value: number }, `${number + 1} of ${call.rows.length}`)));
  const [draft, target] = $("numbers").querySelectorAll("input");
  draft.disabled = call.sampled;
  numbers = call.sampled ? "target" : "draft";
  (call.sampled ? target : draft).checked = true;
  openRow(0);
}

function openRow(index) {
  rowIndex = index;
  rounds = call.rounds.map((round) => [round, round.rows[index]]).filter(([, row]) => row !== null);
  showFigures();
  showPrompt();
  $("answer").replaceChildren(...rounds.map(chunkOf));
  drawTimeline();
  choose(Math.max(rounds.findIndex(([round]) => round.kind === "drafted"), 0), true);
}

function showFigures() {
  const later = rounds.filter(([round]) => round.kind !== "prefill");
  const numTokens = later.reduce((sum, [, row]) => sum + row.pieces.length, 0);
  const seconds = rounds.reduce((sum, [round]) => sum + Object.values(round.seconds).reduce((a, b) => a + b), 0);
  const figures = [
    ["tokens", numTokens + (rounds.length - later.length)],
    ["rounds", later.length],
    ["a round (\u03c4)", later.length ? (numTokens / later.length).toFixed(2) : "\u2013"],
    ["traced", duration(seconds)],
  ];
  $("figures").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

function showPrompt() {
  const { prompt, pictures } = call.rows[rowIndex];
  $("pictures").replaceChildren(...pictures.map((index, number) => make("img", { src: call.pictures[index], alt: `Picture ${number + 1} of the prompt` })));
  $("prompt").replaceChildren(...prompt.map((part) => ("text" in part ? part.text : make("b", {}, `picture, ${count(part.num_visual, "token")}`))));
}

function chunkOf([round, row], index) {
  const chunk = make("span", { role: "option", tabindex: -1, class: `chunk tint${index % 4}`, "aria-selected": false });
  chunk.setAttribute("aria-label", `${titleOf(index)}: ${spoken(row.pieces.join(""))}`);
  let plain = ""; // what is not marked is one text: long answers are many tokens
  const flush = () => chunk.append(...withLineEnds(plain));
  row.pieces.forEach((piece, place) => {
    const kinds = [];
    if (place >= row.accepted.length && round.kind === "drafted") kinds.push("bonus");
    else if (row.tree.ngram[row.accepted[place]]) kinds.push("ngram");
    if (row.special[place]) kinds.push("special");
    if (kinds.length === 0) {
      plain += piece;
      return;
    }
    flush();
    plain = "";
    chunk.append(make("span", { class: kinds.join(" ") }, ...withLineEnds(piece)));
  });
  flush();
  chunk.addEventListener("click", () => choose(index));
  return chunk;
}

function withLineEnds(text) {
  return text.split("\n").flatMap((line, number) => (number ? [make("span", { class: "mark" }, "\u21b5"), "\n", line] : [line]));
}

function titleOf(index) {
  return rounds[index][0].kind === "prefill" ? "Prompt" : `Round ${index} of ${rounds.length - 1}`;
}

function drawTimeline() {
  const most = Math.max(...rounds.map(([, row]) => row.pieces.length));
  const svg = draw("svg", { viewBox: `0 0 ${rounds.length} 1`, preserveAspectRatio: "none", "aria-hidden": true });
  svg.append(draw("rect", { class: "here", y: 0, width: 1, height: 1 }));
  rounds.forEach(([round, row], index) => {
    const height = (0.86 * row.pieces.length) / most;
    const gap = rounds.length > 150 ? 0 : 0.12;
    svg.append(draw("rect", { class: round.kind, x: index + gap, y: 1 - height, width: 1 - 2 * gap, height }));
  });
  $("timeline").replaceChildren(svg);
  $("timeline").setAttribute("aria-valuemax", rounds.length - 1);
}

function choose(index, isFirst = false) {
  const [round, row] = rounds[Math.max(0, Math.min(index, rounds.length - 1))];
  const bars = $("timeline").querySelectorAll("svg rect:not(.here)");
  const chunks = $("answer").children;
  if (!isFirst) {
    bars[chosen].classList.remove("chosen");
    chunks[chosen].setAttribute("aria-selected", false);
  }
  for (const chunk of $("answer").querySelectorAll('[tabindex="0"]')) chunk.setAttribute("tabindex", -1);
  chosen = rounds.findIndex(([other]) => other === round);
  bars[chosen].classList.add("chosen");
  $("timeline").querySelector(".here").setAttribute("x", chosen);
  chunks[chosen].setAttribute("aria-selected", true);
  chunks[chosen].setAttribute("tabindex", 0);
  const talk = document.querySelector(".talk");
  if (!isFirst && talk.scrollHeight > talk.clientHeight) chunks[chosen].scrollIntoView({ block: "nearest" });
  const said = sentenceOf(round, row);
  $("round-heading").textContent = titleOf(chosen);
  $("sentence").replaceChildren(...said.map((part) => (typeof part === "string" ? part : make("q", {}, shown(part.piece)))));
  $("before").disabled = chosen === 0;
  $("after").disabled = chosen === rounds.length - 1;
  $("timeline").setAttribute("aria-valuenow", chosen);
  $("timeline").setAttribute("aria-valuetext", `${titleOf(chosen)}, ${count(row.pieces.length, "token")}`);
  if (!isFirst) $("live").textContent = `${titleOf(chosen)}. ${plainSentence(said)}`;
  showTime(round);
  showTree();
}

function showTime({ kind, seconds }) {
  const names = { draft: "draft", verify: kind === "prefill" ? "read the prompt" : "verify", rest: "rest" };
  const parts = Object.entries(seconds).filter(([part, value]) => value > 0 || part === "verify");
  const bar = make("div", { class: "bar", "aria-hidden": true });
  bar.append(...parts.map(([part, value]) => make("i", { class: part, style: `flex: ${value * 1000} 1 0` })));
  const words = parts.map(([part, value]) => make("span", {}, make("i", { class: part }), `${names[part]} ${milliseconds(value)}`));
  $("time").replaceChildren(bar, ...words);
}

function showTree() {
  const [round, row] = rounds[chosen];
  const hasTree = round.kind !== "prefill" && row.tree.parents.length > 1;
  document.querySelector(".over-tree").hidden = !hasTree;
  if (hasTree) drawTree($("tree"), row, call, numbers, showDetail);
  else $("tree").replaceChildren(make("p", { class: "nothing" }, round.kind === "prefill" ? "No tree: the prompt was read." : "No tree: a plain step."));
  showDetail(null);
  $("note").textContent = hasTree && call.sampled
    ? "Sampled: the draft ranks tokens together with the noise that the target will pick by, which gives no probabilities. Those of the target are after temperature, top-k and the like."
    : "";
}

function showDetail(node) {
  const facts = node === null ? [] : factsOf(node, rounds[chosen][1], call);
  const isEmpty = node === null && $("tree").querySelector("svg");
  $("detail").replaceChildren(...facts.map(([name, value, isCode]) => make("div", {}, make("dt", {}, name), make("dd", isCode ? { class: "code" } : {}, value))));
  if (isEmpty) $("detail").append(make("div", {}, make("dt", {}, "Choose a token to see its numbers.")));
}

function play(goes) {
  clearInterval(playing);
  playing = goes ? setInterval(() => (chosen === rounds.length - 1 ? play(false) : choose(chosen + 1)), SECONDS_A_ROUND * 1000) : null;
  $("play").textContent = goes ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", goes);
}

function setTheme(index) {
  theme = index % THEMES.length;
  document.documentElement.style.colorScheme = THEMES[theme][0];
  $("theme").textContent = THEMES[theme][1];
}

// The round that a key leads to; undefined for other keys.
function roundOf(key, isSlider) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ...(isSlider && { ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 }) };
  if (key in steps) return chosen + steps[key];
  return { Home: 0, End: rounds.length - 1 }[key];
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("select, input")) return;
  const next = roundOf(event.key, event.target === $("timeline"));
  if (next === undefined) return;
  event.preventDefault();
  const wasInAnswer = event.target.closest("#answer");
  choose(next);
  if (wasInAnswer) $("answer").children[chosen].focus();
});

function roundAt(event) {
  const { left, width } = $("timeline").getBoundingClientRect();
  return Math.floor(((event.clientX - left) / width) * rounds.length);
}

$("timeline").addEventListener("pointerdown", (event) => {
  $("timeline").setPointerCapture(event.pointerId);
  choose(roundAt(event));
});
$("timeline").addEventListener("pointermove", (event) => {
  if (event.buttons && roundAt(event) !== chosen) choose(roundAt(event));
});
$("before").addEventListener("click", () => choose(chosen - 1));
$("after").addEventListener("click", () => choose(chosen + 1));
$("play").addEventListener("click", () => play(playing === null));
$("theme").addEventListener("click", () => setTheme(theme + 1));
$("call").addEventListener("change", (event) => openCall(Number(event.target.value)));
$("row").addEventListener("change", (event) => openRow(Number(event.target.value)));
$("numbers").addEventListener("change", (event) => {
  numbers = event.target.value;
  showTree();
});
$("call-choice").hidden = calls.length === 1;
$("call").replaceChildren(...calls.map((own, number) => make("option", { value: number }, `${number + 1} of ${calls.length}`)));
setTheme(0);
openCall(0);
