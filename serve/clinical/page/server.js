// How pages ask the server: addresses, headers, refusals, and streams of events.

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, param: error?.param ?? null, code: error?.code ?? null });
  }
}

export const address = (path, options = {}) => {
  const found = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(options)) found.searchParams.set(name, value);
  return found;
};

export const headers = (key, more = {}) => ({ accept: "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}), ...more });

// The same answer; one that is a refusal is thrown.
export async function answer(response) {
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // an answer of something before the server: its status is all there is to say
  }
  throw new Refused(response.status, body?.error);
}

// The server's models of a kind.
export async function cards(key, kind) {
  const response = await answer(await fetch(address("v1/models"), { headers: headers(key) }));
  return (await response.json()).data.filter((each) => each.kind === kind);
}

// What a stream tells, in turn. Throws Refused where the server failed on the way.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split(/\r?\n\r?\n/);
    rest = found.pop();
    for (const event of found) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (!data || data === "[DONE]") continue;
      const message = JSON.parse(data);
      if (message.error) throw new Refused(200, message.error);
      yield message;
    }
  }
}
