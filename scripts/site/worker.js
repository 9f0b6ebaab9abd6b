// Python in a worker, so that the page never freezes: it gets [id, tab, values] and sends [id, answer].
import { loadPyodide } from "./pyodide/pyodide.mjs";

const here = new URL("./", import.meta.url);

async function bytes(name) {
  const response = await fetch(new URL(name, here));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

async function start() {
  const [python, library] = await Promise.all([
    loadPyodide({ indexURL: new URL("pyodide/", here).href }),
    bytes("bigkit.zip"),
  ]);
  python.unpackArchive(library, "zip"); // into the working folder, which Python's path has
  return python.runPython("import json, planner\nlambda tab, values: json.dumps(planner.answer(tab, json.loads(values)))");
}

const ready = start();
ready.then(() => postMessage(["ready"]), (error) => postMessage(["broken", String(error)]));

onmessage = async ({ data: [id, tab, values] }) => {
  const answer = await ready;
  try {
    postMessage([id, JSON.parse(answer(tab, JSON.stringify(values)))]);
  } catch (error) {
    postMessage([id, { error: String(error).trim().split("\n").pop() }]);
  }
};
