// The server's API: the model's name, and answers as they come.

export async function modelName() {
  const answer = await fetch("/v1/models");
  return answer.ok ? (await answer.json()).data[0].id : "anychip";
}

// Calls `take` with each delta of an answer; returns why it ended. Throws { status, message } when it is refused.
export async function ask(body, signal, take) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) {
    const found = await answer.json().catch(() => null);
    throw { status: answer.status, message: found?.error?.message ?? answer.statusText };
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let reason = null;
  let done = false;
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) break;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") {
        done = true;
        continue;
      }
      const record = JSON.parse(data);
      if (record.error) throw { status: 500, message: record.error.message };
      if (record.usage) take({ tokens: record.usage.completion_tokens });
      for (const choice of record.choices) {
        take(choice.delta);
        reason = choice.finish_reason ?? reason;
      }
    }
  }
  if (!done) throw { status: 0, message: "" };
  return reason;
}
