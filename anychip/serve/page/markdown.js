// Markdown as DOM nodes. Text only ever becomes text: nothing here parses HTML, so nothing in an answer can be markup.
// Pictures are shown as links, and links lead only to http, https and mailto.

export function render(text, words) {
  const root = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), root, words, 0);
  return root;
}

const DEEPEST = 12; // of lists and quotes in each other

function blocks(lines, parent, words, depth) {
  let at = 0;
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) inline(paragraph.join("\n"), append(parent, "p"), 0);
    paragraph = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    if (fence) {
      flush();
      const body = [];
      const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !end.test(lines[at]); at += 1) body.push(lines[at]);
      at += 1;
      code(body.join("\n"), fence[2].trim().split(/\s/)[0], parent, words);
      continue;
    }
    const heading = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (heading) {
      flush();
      inline(heading[2], append(parent, `h${Math.min(heading[1].length, 4)}`), 0);
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      append(parent, "hr");
    } else if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      flush();
      const quoted = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) quoted.push(lines[at].replace(/^ {0,3}> ?/, ""));
      blocks(quoted, append(parent, "blockquote"), words, depth + 1);
      continue;
    } else if (isItem(line) && depth < DEEPEST) {
      flush();
      at = list(lines, at, parent, words, depth);
      continue;
    } else if (line.includes("|") && /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)+\|?\s*$/.test(lines[at + 1] || "")) {
      flush();
      at = table(lines, at, parent);
      continue;
    } else if (!line.trim()) {
      flush();
    } else {
      paragraph.push(line);
    }
    at += 1;
  }
  flush();
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const isItem = (line) => ITEM.test(line);

function list(lines, at, parent, words, depth) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const element = append(parent, ordered ? "ol" : "ul");
  if (ordered) element.start = parseInt(first[2], 10);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length < indent || item[1].length > indent + 1 || /\d/.test(item[2]) !== ordered) break;
    const body = [item[3]];
    const inner = indent + item[2].length + 1;
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const deeper = line.length - line.trimStart().length >= Math.min(inner, indent + 2);
      if (line.trim() && !deeper) break;
      if (!line.trim() && !(lines[at + 1] || "").startsWith(" ".repeat(indent + 2))) break;
      body.push(line.slice(Math.min(inner, line.length - line.trimStart().length)));
    }
    while (at < lines.length && !lines[at].trim() && isItem(lines[at + 1] || "")) at += 1;
    const target = append(element, "li");
    if (body.length === 1) inline(body[0], target, 0);
    else blocks(body, target, words, depth + 1);
  }
  return at;
}

function table(lines, at, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const box = append(parent, "div", "table");
  box.tabIndex = 0;
  const element = append(box, "table");
  const head = append(append(element, "thead"), "tr");
  for (const cell of cells(lines[at])) inline(cell, append(head, "th"), 0);
  const body = append(element, "tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) {
    const row = append(body, "tr");
    for (const cell of cells(lines[at])) inline(cell, append(row, "td"), 0);
  }
  return at;
}

// Marks inside a line, the first that matches: code, strong, emphasis, struck, picture or link, bare address.
const MARK = new RegExp(
  [
    "(`+)([^`]|[^`][^]*?[^`])\\1(?!`)", "\\*\\*(?=\\S)([^]{1,2000}?\\S)\\*\\*", "\\*(?=\\S)([^*]{1,2000}?\\S|\\S)\\*",
    "~~(?=\\S)([^]{1,2000}?\\S)~~", "!?\\[([^\\]\\n]{0,500})\\]\\(([^()\\s]{1,2000})(?:\\s+\"[^\"]*\")?\\)", "(https?://[^\\s<>()\"'`]{1,2000})",
  ].join("|"),
);

function inline(text, parent, depth) {
  while (text) {
    const found = depth > DEEPEST ? null : MARK.exec(text);
    if (!found) break;
    plain(text.slice(0, found.index), parent);
    text = text.slice(found.index + found[0].length);
    const [whole, , codeText, strong, emphasis, struck, label, target, address] = found;
    if (codeText !== undefined) append(parent, "code").textContent = codeText;
    else if (strong !== undefined) inline(strong, append(parent, "strong"), depth + 1);
    else if (emphasis !== undefined) inline(emphasis, append(parent, "em"), depth + 1);
    else if (struck !== undefined) inline(struck, append(parent, "del"), depth + 1);
    else if (address !== undefined) link(address, parent).textContent = address;
    else if (isSafe(target)) inline(label || target, link(target, parent), DEEPEST + 1);
    else plain(whole, parent);
  }
  plain(text, parent);
}

function plain(text, parent) {
  text.split(/ {2,}\n|\\\n/).forEach((part, index) => {
    if (index) append(parent, "br");
    if (part) parent.append(part.replace(/\\([\\`*_{}[\]()#+\-.!|~>])/g, "$1"));
  });
}

const isSafe = (target) => /^(https?:\/\/|mailto:)/i.test(target);

function link(target, parent) {
  const element = append(parent, "a");
  element.href = target;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}

const KEYWORDS =
  "and as assert async await break case catch class const continue def default del do elif else enum except export extends false " +
  "finally fn for from func function global if impl import in interface is lambda let match mut new nil none None not null or pass " +
  "print private public pub raise return self static struct super switch this throw true True False try type use var void while with yield";
const WORD = new Set(KEYWORDS.split(" "));
const TOKEN = /("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`)|(#[^\n]*|\/\/[^\n]*|\/\*[^]*?\*\/)|\b(\d[\w.]*)|\b([A-Za-z_]\w*)/g;

function code(text, language, parent, words) {
  const figure = append(parent, "figure", "code");
  const caption = append(figure, "figcaption");
  append(caption, "span").textContent = language.slice(0, 30);
  const copy = append(caption, "button");
  copy.type = "button";
  copy.textContent = words.copy;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = words.copied;
    setTimeout(() => { copy.textContent = words.copy; }, 1500);
  });
  const pre = append(figure, "pre");
  pre.tabIndex = 0;
  const element = append(pre, "code");
  let last = 0;
  if (text.length < 50000) {
    for (const found of text.matchAll(TOKEN)) {
      const kind = found[1] ? "s" : found[2] ? "c" : found[3] ? "n" : WORD.has(found[4]) ? "k" : "";
      if (!kind) continue;
      element.append(text.slice(last, found.index));
      append(element, "span", kind).textContent = found[0];
      last = found.index + found[0].length;
    }
  }
  element.append(text.slice(last));
}

function append(parent, name, className) {
  const element = document.createElement(name);
  if (className) element.className = className;
  parent.append(element);
  return element;
}
