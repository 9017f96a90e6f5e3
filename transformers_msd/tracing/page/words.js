"use strict";

// What is said of rounds and tokens, in words.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

// Spaces and line ends as marks that can be seen: parts of a piece, each with whether it is a mark.
function visible(piece) {
  if (piece === "") return [["\u2026", true]];
  return [...piece.matchAll(/[ \n\r\t]|[^ \n\r\t]+/g)].map(([part]) => {
    const mark = { " ": "\u00b7", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5" }[part];
    return mark ? [mark, true] : [part, false];
  });
}

function shown(piece) {
  return visible(piece).map(([part]) => part).join("");
}

// A piece as a screen reader should say it.
function spoken(piece) {
  if (piece === "") return "part of a character";
  const text = piece.replaceAll("\n", " line end ").replaceAll("\t", " tab ");
  return text.trim() === "" ? "space" : text.trim();
}

function percent(probability) {
  if (probability === null || probability === undefined) return "";
  const value = probability * 100;
  if (value > 0 && value < 1) return "<1";
  return value < 100 && value > 99.5 ? ">99" : String(Math.round(value));
}

function exactly(probability) {
  if (probability === null || probability === undefined) return "not known";
  return probability >= 0.001 ? `${(probability * 100).toFixed(1)} %` : `${(probability * 100).toPrecision(1)} %`;
}

function milliseconds(seconds) {
  const value = seconds * 1000;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function duration(seconds) {
  return seconds < 1 ? milliseconds(seconds) : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

// Tokens of the prompt, those of pictures among them, are told by their text alone; a round says what it did.
function sentenceOf(round, row) {
  if (round.kind === "prefill") {
    return ["The target read the prompt and chose the first token, ", row.bonus, "."];
  }
  if (round.kind === "plain" || row.tree.parents.length === 1) {
    const why = round.rests ? "Drafting rested, as it had not paid of late" : "Nothing was drafted";
    return [`${why}: a plain step of one token, `, row.bonus, "."];
  }
  const numDrafted = row.tree.parents.length - 1;
  const numNgrams = row.tree.ngram.reduce((sum, own) => sum + own, 0);
  const which = numNgrams === 0 ? "" : numNgrams === numDrafted ? " from the text so far" : `, ${numNgrams} of them from the text so far`;
  const drafted = `${count(numDrafted, "token")} ${numNgrams === numDrafted ? "tried" + which : "drafted" + which}`;
  const took = row.accepted.length === 0 ? "the target took none" : `the target took ${row.accepted.length}`;
  if (!row.bonus) return [`${drafted}; ${took}, and there the answer ends.`];
  const forward = `: ${count(row.pieces.length, "token")} for one forward.`;
  return [`${drafted}; ${took} and ${row.accepted.length ? "added" : "said"} `, row.bonus, forward];
}

function plainSentence(parts) {
  return parts.map((part) => (typeof part === "string" ? part : spoken(part.piece))).join("");
}

// What is known of a node, as names and values.
function factsOf(node, row, call) {
  const facts = [["token", shown(node.piece), true], ["id", String(node.tokenId)]];
  if (node.kind === "root") return [...facts, ["what it is", "the token emitted last"]];
  if (node.kind === "bonus") {
    return [...facts, ["chosen by", "the target, after the accepted path"], ["target", exactly(node.target)]];
  }
  facts.push(["tried by", node.ngram ? "n-grams: it stood before in the text" : "the draft"]);
  if (!call.sampled) facts.push([node.ngram ? "how often such were right" : "draft, after its parent", exactly(node.draft)]);
  if (!call.sampled && node.path !== null) facts.push(["whole path", exactly(node.path)]);
  facts.push(["target, after its parent", exactly(node.target)]);
  return [...facts, ["verdict", node.kind === "accepted" ? "accepted" : "rejected"]];
}

function labelOf(node, call) {
  const said = [spoken(node.piece)];
  if (node.kind === "root") return `${said[0]}, the token emitted last`;
  if (node.kind === "bonus") return `${said[0]}, the target's own token, ${exactly(node.target)}`;
  said.push(node.kind, node.ngram ? "from the text so far" : "drafted");
  if (!call.sampled && node.draft !== null) said.push(`draft ${exactly(node.draft)}`);
  if (node.target !== null) said.push(`target ${exactly(node.target)}`);
  return said.join(", ");
}
