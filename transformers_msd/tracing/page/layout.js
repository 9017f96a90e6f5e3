// Where the nodes of a tree stand: from left to right by depth, the accepted path straight along the top.

const NODE_HEIGHT = 26;
const NODE_GAP = 6;
const COLUMN_GAP = 24;
const MOST_CHARACTERS = 18;

// The nodes of a row's tree and the bonus token behind the accepted path, each with its children, best first.
function nodesOf(row) {
  const { token_ids, pieces, parents, draft, target, ngram } = row.tree;
  const accepted = new Set(row.accepted);
  const nodes = parents.map((parent, index) => ({
    index, parent, children: [], tokenId: token_ids[index], piece: pieces[index], draft: draft[index],
    target: target[index], ngram: Boolean(ngram[index]),
    kind: index === 0 ? "root" : accepted.has(index) ? "accepted" : "rejected",
  }));
  if (row.bonus) {
    const parent = row.accepted.length ? row.accepted[row.accepted.length - 1] : 0;
    nodes.push({
      index: nodes.length, parent, children: [], tokenId: row.bonus.token_id, piece: row.bonus.piece, draft: null,
      target: row.bonus.target, ngram: false, kind: "bonus",
    });
  }
  for (const node of nodes) {
    const parent = nodes[node.parent];
    node.depth = parent ? parent.depth + 1 : 0;
    const before = !parent ? 1 : parent.path;
    node.path = node.kind === "root" ? 1 : node.draft === null || before === null ? null : before * node.draft;
    if (parent) parent.children.push(node);
  }
  const place = { accepted: 0, bonus: 0, rejected: 1 };
  const weight = (node) => node.draft ?? node.target ?? 0;
  for (const node of nodes) node.children.sort((a, b) => place[a.kind] - place[b.kind] || weight(b) - weight(a));
  return nodes;
}

function cutShort(piece) {
  const parts = visible(piece);
  let left = MOST_CHARACTERS;
  const kept = [];
  for (const [part, isMark] of parts) {
    if (left <= 0) break;
    const characters = [...part];
    kept.push([characters.length > left ? characters.slice(0, left - 1).join("") + "\u2026" : part, isMark]);
    left -= characters.length;
  }
  return kept;
}

// Give each node its place and size; return the size of the whole.
function layOut(nodes, numbers, widthOf) {
  const columns = [];
  for (const node of nodes) {
    node.parts = cutShort(node.piece);
    node.number = node.kind === "root" ? "" : percent(node.kind === "bonus" ? node.target : node[numbers]);
    node.textWidth = widthOf(node.parts.map(([part]) => part).join(""));
    const numberWidth = node.number ? widthOf(node.number) * 0.85 + 9 : 0;
    node.width = Math.max(30, node.textWidth + numberWidth + 16);
    columns[node.depth] = Math.max(columns[node.depth] ?? 0, node.width);
  }
  const starts = [2];
  for (const width of columns) starts.push(starts[starts.length - 1] + width + COLUMN_GAP);
  let line = 0;
  const place = (node) => {
    node.x = starts[node.depth];
    node.line = line;
    node.y = 4 + line * (NODE_HEIGHT + NODE_GAP);
    node.children.forEach((child, number) => {
      if (number > 0) line += 1;
      place(child);
    });
  };
  place(nodes[0]);
  const width = starts[starts.length - 1] - COLUMN_GAP + 2;
  return { width, height: 4 + line * (NODE_HEIGHT + NODE_GAP) + NODE_HEIGHT + 4 };
}
