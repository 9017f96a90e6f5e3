// A tree as a picture whose nodes can be walked by keys.

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const measured = new Map();
const measuring = document.createElement("canvas").getContext("2d");

function widthOf(text) {
  if (!measured.has(text)) {
    if (!measured.size) measuring.font = `600 13px ${getComputedStyle(document.body).getPropertyValue("--code")}`;
    measured.set(text, measuring.measureText(text).width);
  }
  return measured.get(text);
}

const LEAST_SCALE = 0.8;

function edgeTo(node, parent) {
  const [x1, y1] = [parent.x + parent.width, parent.y + NODE_HEIGHT / 2];
  const [x2, y2] = [node.x, node.y + NODE_HEIGHT / 2];
  const bend = node.x - COLUMN_GAP / 2;
  const path = y1 === y2 ? `M${x1} ${y1}H${x2}` : `M${x1} ${y1}H${bend - 8}C${bend} ${y1} ${bend} ${y1} ${bend} ${y1 + 8}V${y2 - 8}C${bend} ${y2} ${bend} ${y2} ${bend + 8} ${y2}H${x2}`;
  return draw("path", { class: `edge ${node.kind}`, d: path });
}

function boxOf(node, call, numbers) {
  const classes = ["node", node.kind, node.ngram ? "ngram" : ""].join(" ").trim();
  const box = draw("g", {
    class: classes, role: "treeitem", tabindex: -1, transform: `translate(${node.x} ${node.y})`,
    "aria-level": node.depth + 1, "aria-label": labelOf(node, call), "aria-selected": node.kind === "accepted",
  });
  const round = node.kind === "bonus" ? NODE_HEIGHT / 2 : 6;
  box.append(draw("rect", { class: "box", width: node.width, height: NODE_HEIGHT, rx: round }));
  const text = draw("text", { x: 8, y: 17 });
  for (const [part, isMark] of node.parts) text.append(draw("tspan", isMark ? { class: "mark" } : {}, part));
  box.append(text);
  if (node.number) {
    const probability = node.kind === "bonus" ? node.target : node[numbers];
    box.append(draw("text", { class: "number", x: node.width - 8, y: 16.5, "text-anchor": "end" }, node.number));
    const width = Math.max((node.width - 2 * round) * probability, 1);
    box.append(draw("rect", { class: "bar", x: round, y: NODE_HEIGHT - 4, width, height: 2, rx: 1 }));
  }
  return box;
}

// Draw a row's tree into an element, with the `numbers` of draft or target; `show` is told which node is looked at.
function drawTree(into, row, call, numbers, show) {
  const nodes = nodesOf(row);
  const { width, height } = layOut(nodes, numbers, widthOf);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "tree", "aria-label": "Drafted tokens" });
  // A little smaller where that spares scrolling.
  svg.style.width = `clamp(${LEAST_SCALE * width}px, 100%, ${width}px)`;
  const edges = draw("g", { "aria-hidden": true });
  // What stands is drawn last, on top.
  const order = { rejected: 0, bonus: 1, accepted: 2 };
  for (const node of nodes.slice(1).sort((a, b) => order[a.kind] - order[b.kind])) edges.append(edgeTo(node, nodes[node.parent]));
  svg.append(edges);
  const boxes = nodes.map((node) => boxOf(node, call, numbers));
  const inReadingOrder = [...nodes].sort((a, b) => a.line - b.line || a.depth - b.depth);
  for (const node of inReadingOrder) svg.append(boxes[node.index]);
  let current = null;
  const look = (node) => {
    if (current !== null) boxes[current].classList.remove("shown");
    current = node.index;
    boxes[current].classList.add("shown");
    show(node);
  };
  const focus = (node) => {
    for (const box of boxes) box.setAttribute("tabindex", -1);
    boxes[node.index].setAttribute("tabindex", 0);
    boxes[node.index].focus({ preventScroll: true });
    boxes[node.index].scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  boxes[0].setAttribute("tabindex", 0);
  nodes.forEach((node) => {
    boxes[node.index].addEventListener("mouseenter", () => look(node));
    boxes[node.index].addEventListener("click", () => focus(node));
    boxes[node.index].addEventListener("focus", () => look(node));
  });
  svg.addEventListener("keydown", (event) => {
    const next = neighbour(nodes, inReadingOrder, nodes[current ?? 0], event.key);
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    focus(next);
  });
  into.replaceChildren(svg);
}

// The node that a key leads to; undefined for other keys.
function neighbour(nodes, inReadingOrder, node, key) {
  const column = inReadingOrder.filter((other) => other.depth === node.depth);
  const place = column.indexOf(node);
  switch (key) {
    case "ArrowRight": return node.children[0] ?? node;
    case "ArrowLeft": return nodes[node.parent] ?? node;
    case "ArrowDown": return column[place + 1] ?? node;
    case "ArrowUp": return column[place - 1] ?? node;
    case "Home": return nodes[0];
    case "End": return nodes.find((other) => other.kind === "bonus") ?? nodes.findLast((other) => other.kind === "accepted") ?? nodes[0];
    default: return undefined;
  }
}
