// What is said to the server, and how its answers are read.

const KEY = "moe-lm key";

/** What the server refused, or that it gave no answer; `status` is the HTTP status, 0 for none. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The API key is kept for this tab alone. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function call(path, options) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("no answer from the server");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `the server answered ${response.status}`, response.status);
}

/** The JSON at `path`; no answer within `seconds` is an error. */
export async function getJson(path, seconds) {
  const response = await call(path, { signal: AbortSignal.timeout(seconds * 1000) });
  return response.json().catch(() => {
    throw new ApiError("no answer from the server");
  });
}

/** The chunks of a streamed answer. Ending the loop, or the signal, closes the connection. */
export async function* stream(path, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (pending + value).split(/\r?\n/);
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        // What follows is the end of the response; read to it, the connection serves the next request.
        complete ||= data === "[DONE]";
        if (complete) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("the connection broke before the answer was complete");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!complete) throw new ApiError("the connection ended before the answer was complete");
}

/** A request as a command for a shell; the key stays out of it. */
export function curl(path, body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = sessionStorage.getItem(KEY) ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  return `curl -N ${location.origin}${path} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}
