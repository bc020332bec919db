// A client of lmesh over gRPC: node lmesh_client.mjs chat "What is a mesh?" (or: models, error, cancel, resume).
import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import protobuf from "protobufjs";

const TARGET = process.env.LMESH_TARGET ?? "127.0.0.1:50051";
const MODEL = process.env.LMESH_MODEL ?? "smollm2-135m-instruct";
const TIMEOUT_MS = 120_000;

const definition = loadSync("lmesh/inference/v1/inference.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  enums: String,
  longs: String,
  defaults: true,
  oneofs: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).lmesh.inference.v1;

// What google.rpc.Status carries in the trailer grpc-status-details-bin; only what is read here.
const details = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`, { keepCase: true }).root;

function metadata() {
  const headers = new grpc.Metadata();
  if (process.env.LMESH_API_KEY) headers.set("x-api-key", process.env.LMESH_API_KEY);
  return headers;
}

const options = () => ({ deadline: Date.now() + TIMEOUT_MS });

/** A greedy conversation of one turn. */
function requestFor(question, maxTokens = 128) {
  return {
    model: MODEL,
    chat: { messages: [{ role: "user", content: question }] },
    sampling: { temperature: 0 },
    stop: { maxTokens },
    requestId: randomUUID(),
  };
}

/** Prints one event: text as it comes, usage at the end. */
function show(event) {
  if (event.event === "delta") process.stdout.write(event.delta.text);
  if (event.event === "finish") {
    const { promptTokens, cachedTokens, completionTokens } = event.finish.usage;
    console.log(`\nusage: prompt=${promptTokens} (cached ${cachedTokens}) new=${completionTokens}`);
  }
}

/** One line: the code, the stable reason where the server gave one, and the message for people. */
function showError(error) {
  const info = errorInfo(error);
  const reason = info ? ` reason=${info.reason} retryable=${info.metadata.retryable}` : "";
  console.log(`error: ${grpc.status[error.code]}${reason}: ${error.details}`);
}

function errorInfo(error) {
  const [trailer] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!trailer) return undefined;
  const found = details.lookupType("Status").decode(trailer)
    .details.find((any) => any.type_url.endsWith("/google.rpc.ErrorInfo"));
  return found && details.lookupType("ErrorInfo").decode(found.value);
}

/** Streams an answer. */
async function chat(client, question) {
  for await (const event of client.Generate(requestFor(question), metadata(), options())) show(event);
}

/** Asks for a model that is not there. */
async function error(client, question) {
  try {
    const request = { ...requestFor(question), model: "no-such-model" };
    for await (const event of client.Generate(request, metadata(), options())) show(event);
  } catch (refusal) {
    showError(refusal);
  }
}

/** Cancels its own call after some tokens; another client would send Cancel with the request's id. */
async function cancel(client, question) {
  const call = client.Generate(requestFor(question, 2000), metadata(), options());
  let received = 0;
  try {
    for await (const event of call) {
      received += event.delta?.tokenIds.length ?? 0;
      if (received >= 5) call.cancel();
    }
  } catch (ended) {
    console.log(`cancelled after ${received} tokens: ${grpc.status[ended.code]}`);
  }
}

/** Breaks off a stream that was detached from its client, and asks for the rest of it. */
async function resume(client, question) {
  const request = { ...requestFor(question), onDisconnect: "ON_DISCONNECT_DETACH", detachTtl: { seconds: 60 } };
  const call = client.Generate(request, metadata(), options());
  let cursor = 0;
  call.on("error", () => {}); // the cancellation below comes back as one
  for await (const event of call) {
    show(event);
    cursor += event.delta?.tokenIds.length ?? 0;
    if (cursor > 0) break;
  }
  call.cancel(); // as a broken connection would
  console.log(`\n-- lost the stream after ${cursor} tokens --`);
  const rest = client.Resume({ requestId: request.requestId, cursor: [cursor] }, metadata(), options());
  for await (const event of rest) show(event);
}

/** Lists the models. */
function models(client) {
  return new Promise((resolve, reject) => {
    client.ListModels({}, metadata(), options(), (failure, answer) => {
      if (failure) return reject(failure);
      for (const model of answer.models) {
        console.log(`${model.id}: context ${model.maxModelLen}, workers ${model.workers}`);
      }
      resolve();
    });
  });
}

const commands = { chat, error, cancel, resume, models };
const [name, question = "What is the capital of France?"] = process.argv.slice(2);
if (!commands[name]) {
  console.error(`usage: node lmesh_client.mjs ${Object.keys(commands).join("|")} [question]`);
  process.exit(2);
}
const client = new InferenceService(TARGET, grpc.credentials.createInsecure());
try {
  await commands[name](client, question);
} catch (failure) {
  if (failure.code === undefined) throw failure;
  showError(failure);
  process.exitCode = 1;
} finally {
  client.close();
}
