// Calls of clients for JavaScript, each in the client's own terms; see calls.py for what is given and printed.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const given = JSON.parse(process.argv[3]);
const KEY = "secret";
const LONG = "word ".repeat(20000);
const PICTURE = readFileSync(given.image);
const DATA_URI = `data:image/png;base64,${PICTURE.toString("base64")}`;
const ASKED = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: DATA_URI } },
      { type: "text", text: given.question },
    ],
  },
];

function equals(found, expected) {
  if (JSON.stringify(found) !== JSON.stringify(expected)) {
    throw new Error(`${JSON.stringify(found)} instead of ${JSON.stringify(expected)}`);
  }
}

const SCHEMA = {
  type: "object",
  properties: { count: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["count"],
  additionalProperties: false,
};

function counts(found) {
  if (!(found.count >= 0 && found.count <= 99)) throw new Error(JSON.stringify(found));
}

async function raises(isIt, call, word = "") {
  let answer;
  try {
    answer = await call();
  } catch (error) {
    const said = `${error.message} ${error.code ?? ""} ${error.responseBody ?? ""}`;
    if (!isIt(error) || !said.includes(word)) throw error;
    return;
  }
  throw new Error(`answered instead of failing: ${JSON.stringify(answer)}`);
}

function openaiCalls() {
  const client = new OpenAI({ baseURL: given.base_url, apiKey: KEY, maxRetries: 0 });
  const ask = (options = {}) =>
    client.chat.completions.create({ model: given.model, messages: ASKED, ...options });
  const text = async (options) => (await ask(options)).choices[0].message.content;
  const is = (kind) => (error) => error instanceof kind;
  return {
    image: async () => equals(await text(), given.answer),
    stream: async () => {
      let found = "";
      for await (const chunk of await ask({ stream: true })) found += chunk.choices[0]?.delta?.content ?? "";
      equals(found, given.answer);
    },
    turns: () =>
      text({
        messages: [
          { role: "system", content: "Answer with one word." },
          { role: "user", content: "Hello" },
          { role: "assistant", content: null },
          ...ASKED,
        ],
      }),
    options: async () => {
      equals(await text({ top_k: 1, temperature: 1 }), given.answer);
      equals((await ask({ max_tokens: 1 })).choices[0].finish_reason, "length");
    },
    models: async () => {
      equals((await client.models.list()).data.map((card) => card.id), [given.model]);
      equals((await client.models.retrieve(given.model)).id, given.model);
      await raises(is(OpenAI.NotFoundError), () => client.models.retrieve("nobody"), "nobody");
    },
    errors: async () => {
      const long = [{ role: "user", content: LONG }];
      await raises(is(OpenAI.BadRequestError), () => text({ messages: long }), "context_length_exceeded");
      await raises(is(OpenAI.BadRequestError), () => text({ guided_json: {} }), "guided_json");
      await raises(is(OpenAI.NotFoundError), () => text({ model: "nobody" }), "nobody");
      const stranger = client.withOptions({ apiKey: "wrong" });
      await raises(is(OpenAI.AuthenticationError), () => stranger.models.list());
    },
    leaving: async () => {
      const hasty = client.withOptions({ timeout: 50 });
      await raises(is(OpenAI.APIConnectionTimeoutError), () =>
        hasty.chat.completions.create({ model: given.model, messages: ASKED }),
      );
      equals(await text(), given.answer);
    },
    schema: async () => {
      const json_schema = { name: "count", schema: SCHEMA, strict: true };
      const parsed = await client.chat.completions.parse({
        model: given.model,
        messages: ASKED,
        response_format: { type: "json_schema", json_schema },
      });
      counts(JSON.parse(parsed.choices[0].message.content));
    },
    function: async () => {
      const tools = [{ type: "function", function: { name: "count", parameters: SCHEMA } }];
      const [call] = (await ask({ tools, tool_choice: "required" })).choices[0].message.tool_calls;
      counts(JSON.parse(call.function.arguments));
    },
    many: async () => equals(await Promise.all(Array.from({ length: 16 }, () => text())), Array(16).fill(given.answer)),
  };
}

function aiSdkCalls() {
  const provider = (apiKey) =>
    createOpenAICompatible({
      name: "vlmray",
      baseURL: given.base_url,
      apiKey,
      supportsStructuredOutputs: true,
    });
  const messages = [
    {
      role: "user",
      content: [
        { type: "image", image: PICTURE, mediaType: "image/png" },
        { type: "text", text: given.question },
      ],
    },
  ];
  const asking = (options = {}, model = given.model, key = KEY) => ({
    model: provider(key)(model),
    messages,
    maxRetries: 0,
    ...options,
  });
  const ask = (...args) => generateText(asking(...args));
  const failed = (status) => (error) => APICallError.isInstance(error) && error.statusCode === status;
  return {
    image: async () => equals((await ask()).text, given.answer),
    stream: async () => {
      let found = "";
      for await (const piece of streamText(asking()).textStream) found += piece;
      equals(found, given.answer);
    },
    turns: () => ask({ system: "Answer with one word." }),
    options: async () => {
      equals((await ask({ maxOutputTokens: 1 })).finishReason, "length");
    },
    errors: async () => {
      const long = { messages: [{ role: "user", content: LONG }] };
      await raises(failed(400), () => ask(long), "context_length_exceeded");
      await raises(failed(404), () => ask({}, "nobody"), "nobody");
      await raises(failed(401), () => ask({}, given.model, "wrong"));
    },
    schema: async () => counts((await generateObject(asking({ schema: jsonSchema(SCHEMA) }))).object),
    function: async () => {
      const tools = { count: tool({ inputSchema: jsonSchema(SCHEMA) }) };
      const [call] = (await ask({ tools, toolChoice: "required" })).toolCalls;
      counts(call.input);
    },
    many: async () => {
      const found = await Promise.all(Array.from({ length: 16 }, () => ask()));
      equals(found.map((each) => each.text), Array(16).fill(given.answer));
    },
  };
}

const clients = { "openai (JavaScript)": openaiCalls, "AI SDK": aiSdkCalls };
for (const [call, make] of Object.entries(clients[process.argv[2]]())) {
  let outcome = "ok";
  try {
    await make();
  } catch (error) {
    outcome = `${error.constructor.name}: ${error.message}`.slice(0, 500);
  }
  console.log(JSON.stringify({ call, outcome }));
}
