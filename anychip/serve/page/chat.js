// The page: a list of conversations, the turns of one, a box to ask in.

import { ask, modelName } from "./api.js";
import { render } from "./markdown.js";
import { loadConversations, loadSettings, saveConversations, saveSettings } from "./store.js";
import { WORDS } from "./words.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

const settings = loadSettings();
const conversations = loadConversations();
let current = { id: newId(), turns: [] };
let running = null; // the AbortController of the answer that is being made

const language = () => (WORDS[settings.language] ? settings.language : /^zh/i.test(navigator.language) ? "zh" : "en");
const words = () => WORDS[language()];
const isDark = () => (settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, action, className) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

// ---- words and looks

function dress() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  document.documentElement.classList.toggle("dark", isDark());
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = words()[one.dataset.text];
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", words()[one.dataset.label]);
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = words()[one.dataset.placeholder];
  $("language").textContent = words().language;
  $("theme").textContent = isDark() ? words().themeLight : words().theme;
  $("theme").setAttribute("aria-label", $("theme").textContent);
  showList();
  showTurns();
}

// ---- the list

function showList() {
  $("list").replaceChildren(
    ...conversations.filter((one) => one.turns.length).map((one) => {
      const item = element("li", one.id === current.id ? "current" : "");
      const title = button(one.turns[0].content.slice(0, 80), () => open(one), "title");
      if (one.id === current.id) title.setAttribute("aria-current", "true");
      const remove = button("✕", () => forget(one), "remove");
      remove.setAttribute("aria-label", `${words().remove}: ${title.textContent}`);
      item.append(title, remove);
      return item;
    }),
  );
}

function open(conversation) {
  running?.abort();
  current = conversation;
  showList();
  showTurns();
  showSide(false);
  $("scroll").scrollTop = $("scroll").scrollHeight;
  $("question").focus();
}

function forget(conversation) {
  if (conversation.id === current.id) open({ id: newId(), turns: [] });
  conversations.splice(conversations.indexOf(conversation), 1);
  saveConversations(conversations);
  showList();
}

function keep() {
  const place = conversations.indexOf(current);
  if (place >= 0) conversations.splice(place, 1);
  conversations.unshift(current);
  saveConversations(conversations);
  showList();
}

function showSide(shown) {
  $("side").classList.toggle("open", shown);
  $("veil").hidden = !shown;
  (shown ? $("new") : $("question")).focus();
}

// ---- the turns

function showTurns() {
  $("welcome").hidden = current.turns.length > 0;
  $("turns").replaceChildren(...current.turns.map((turn, place) => turnElement(turn, place)));
}

function turnElement(turn, place) {
  const item = element("li", `turn ${turn.role}`);
  item.append(element("span", "unseen", `${turn.role === "user" ? words().you : words().model}: `));
  if (turn.role === "user") {
    item.append(turn.content);
    return item;
  }
  const thinking = element("details", "thinking");
  const summary = element("summary", "", words().thought);
  const thoughts = element("div", "body");
  thinking.append(summary, thoughts);
  const body = element("div", "body");
  item.append(thinking, body);
  item.fill = () => {
    thinking.hidden = !turn.reasoning;
    summary.textContent = turn.content || turn.done ? words().thought : words().thinking;
    thoughts.replaceChildren(render(turn.reasoning || "", words()));
    body.replaceChildren(render(turn.content, words()));
    body.classList.toggle("waiting", turn.done === false);
  };
  item.fill();
  if (turn.done !== false) item.append(turnTools(turn, place));
  if (turn.error) item.append(element("p", "error", turn.error));
  return item;
}

function turnTools(turn, place) {
  const tools = element("div", "tools");
  const copy = button(words().copy, async () => {
    await navigator.clipboard.writeText(turn.content);
    copy.textContent = words().copied;
  });
  tools.append(copy);
  if (place === current.turns.length - 1) tools.append(button(words().retry, retry, "retry"));
  if (turn.note) tools.append(element("span", "", turn.note));
  return tools;
}

// ---- asking

function retry() {
  if (running) return;
  while (current.turns.length && current.turns.at(-1).role === "assistant") current.turns.pop();
  answer();
}

function requestBody() {
  const messages = current.turns
    .filter((turn) => turn.done !== false)
    .map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const body = { messages };
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) body[name] = settings[name];
  return body;
}

async function answer() {
  const conversation = current;
  const body = requestBody();
  const turn = { role: "assistant", content: "", reasoning: "", done: false };
  conversation.turns.push(turn);
  showTurns();
  const control = (running = new AbortController());
  setRunning(true);
  $("scroll").scrollTop = $("scroll").scrollHeight;
  let tokens = 0;
  let started = 0;
  let drawing = false;
  const draw = () => {
    drawing = false;
    if (conversation !== current || turn.done) return;
    const atEnd = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
    $("turns").lastElementChild?.fill?.();
    if (atEnd) $("scroll").scrollTop = $("scroll").scrollHeight;
  };
  try {
    const reason = await ask(body, control.signal, (delta) => {
      started ||= performance.now();
      tokens = delta.tokens ?? tokens;
      turn.content += delta.content ?? "";
      turn.reasoning += delta.reasoning_content ?? "";
      if (!drawing) {
        drawing = true;
        requestAnimationFrame(draw);
      }
    });
    const speed = tokens / Math.max((performance.now() - started) / 1000, 0.001);
    turn.note = `${speed.toFixed(speed < 10 ? 1 : 0)} ${words().tokensPerSecond}`;
    if (reason === "length") turn.note += ` · ${words().cut}`;
  } catch (error) {
    if (control.signal.aborted) turn.note = words().stopped;
    else turn.error = error.status === 429 ? words().full : error.message || words().lost;
  }
  turn.done = true;
  const atEnd = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
  if (running === control) setRunning(false);
  keepTurn(conversation);
  if (conversation === current) {
    showTurns();
    if (atEnd) $("scroll").scrollTop = $("scroll").scrollHeight;
  }
}

function keepTurn(conversation) {
  if (conversation === current) keep();
  else saveConversations(conversations);
}

function setRunning(on) {
  if (!on) running = null;
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("status").textContent = on ? words().answering : words().answered;
}

function submit() {
  const text = $("question").value.trim();
  if (!text || running) return;
  $("question").value = "";
  fit();
  current.turns.push({ role: "user", content: text });
  keep();
  answer();
}

function fit() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  $("send").disabled = !box.value.trim();
}

// ---- settings

function openSettings() {
  $("system").value = settings.system ?? "";
  for (const name of NUMBERS) $(name).value = settings[name] ?? "";
  $("settings").showModal();
}

function keepSettings() {
  settings.system = $("system").value.trim();
  for (const name of NUMBERS) {
    const box = $(name);
    settings[name] = box.value !== "" && box.checkValidity() ? Number(box.value) : undefined;
  }
  saveSettings(settings);
}

function set(name, value) {
  settings[name] = value;
  saveSettings(settings);
  dress();
}

// ---- beginning

$("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("question").addEventListener("input", fit);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if ($("side").classList.contains("open")) showSide(false);
  else running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => open({ id: newId(), turns: [] }));
$("open-side").addEventListener("click", () => showSide(true));
$("close-side").addEventListener("click", () => showSide(false));
$("veil").addEventListener("click", () => showSide(false));
$("language").addEventListener("click", () => set("language", language() === "zh" ? "en" : "zh"));
$("theme").addEventListener("click", () => set("theme", isDark() ? "light" : "dark"));
$("open-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", keepSettings);
$("reset").addEventListener("click", () => {
  for (const name of ["system", ...NUMBERS]) $(name).value = "";
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);

dress();
fit();
modelName().then((name) => {
  $("model").textContent = name;
  document.title = name === "anychip" ? name : `${name} · anychip`;
});
if (matchMedia("(min-width: 761px)").matches) $("question").focus();
