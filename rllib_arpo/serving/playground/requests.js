/* The server's API: its models, an answer as a stream of events, and the same as curl. */

export const CHAT = new URL("v1/chat/completions", document.baseURI).href;
const MODELS = new URL("v1/models", document.baseURI).href;

const BROKEN_OFF = "The connection ended before the answer was complete.";

/** An error with the text for the user; `status` is 0 when it is not of HTTP. */
export class RequestError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headersOf(key) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  return headers;
}

/** Names of the models that are served. */
export async function listModels(key) {
  const response = await send(MODELS, { headers: headersOf(key) });
  return (await response.json()).data.map((model) => model.id);
}

/** The chunks of a streamed answer, parsed; ends after [DONE]. */
export async function* streamAnswer(request, key, signal) {
  const response = await send(CHAT, {
    method: "POST",
    headers: headersOf(key),
    body: JSON.stringify(request),
    signal,
  });
  let complete = false;
  try {
    // Read to its end: leaving earlier would cut the connection.
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") complete = true;
      if (complete) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new RequestError(textOf(chunk.error));
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof RequestError) throw error;
    throw new RequestError(`${BROKEN_OFF} (${error.message})`);
  }
  if (!complete) throw new RequestError(BROKEN_OFF);
}

async function send(url, options) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  let message = body?.error
    ? textOf(body.error)
    : `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  const wait = response.headers.get("Retry-After");
  if (wait) message += `${message.endsWith(".") ? "" : "."} Try again in ${wait} s.`;
  return new RequestError(message, response.status);
}

function textOf({ message, type, param, code }) {
  const details = [type, param && `field ${param}`, code].filter(Boolean).join(", ");
  return details ? `${message} (${details})` : `${message}`;
}

/** The data of server-sent events; comments and other fields are passed over. */
export async function* eventsOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  let ended = false;
  try {
    while (true) {
      const { value, done } = await reader.read();
      ended = done;
      if (ended) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // A stream that has broken off cannot be cancelled, and need not be.
    if (!ended) await reader.cancel().catch(() => {});
  }
}

/** The request as a command for a POSIX shell; the key stays in its variable. */
export function curlOf(request, withKey) {
  const parts = [`curl -N ${quoted(CHAT)}`, "-H 'Content-Type: application/json'"];
  if (withKey) parts.push('-H "Authorization: Bearer $RLLIB_ARPO_API_KEY"');
  parts.push(`--data-raw ${quoted(JSON.stringify(request))}`);
  return parts.join(" \\\n  ");
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
