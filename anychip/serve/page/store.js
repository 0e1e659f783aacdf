// Conversations and settings in this browser's own storage. What is read is checked: another page may have written it.

const KEY = "anychip.conversations";
const SETTINGS = "anychip.settings";
const MOST = 200;

export function loadConversations() {
  const found = read(KEY);
  if (!Array.isArray(found)) return [];
  return found
    .filter((one) => one && typeof one.id === "string" && Array.isArray(one.turns))
    .map((one) => ({
      id: one.id,
      turns: one.turns
        .filter((turn) => turn && ["user", "assistant"].includes(turn.role) && typeof turn.content === "string")
        .map((turn) => ({ role: turn.role, content: turn.content, reasoning: typeof turn.reasoning === "string" ? turn.reasoning : "" })),
    }));
}

// When the storage is full the oldest conversations make room.
export function saveConversations(conversations) {
  const kept = conversations.filter((one) => one.turns.length).slice(0, MOST);
  while (!write(KEY, kept) && kept.length > 1) kept.pop();
}

export function loadSettings() {
  const found = read(SETTINGS);
  return found && typeof found === "object" && !Array.isArray(found) ? found : {};
}

export function saveSettings(settings) {
  write(SETTINGS, settings);
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
