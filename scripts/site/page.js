// The page: tabs and fields made from first.json, the state in the address, one question to the worker at a time.
// Leaves out: all answers, which planner.py gives.

import { attach } from "./touch.js";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

let first; // what the build computed: the form, and the first answer of each tab
let tab; // the tab that is open
const values = {}; // tab -> name -> text
let shown = null; // the last good answer

// ---------------------------------------------------------------------------------------------------------------------
// The state in the address: #plan?model=gpt2&machine=L4

const fresh = (name) =>
  Object.fromEntries(Object.entries(first.form.tabs[name].fields).map(([key, field]) => [key, field.value]));

function readAddress() {
  const [name, query = ""] = location.hash.slice(1).split(/\?(.*)/s);
  const chosen = Object.hasOwn(first.form.tabs, name) ? name : Object.keys(first.form.tabs)[0];
  const given = Object.fromEntries(new URLSearchParams(query));
  values[chosen] = fresh(chosen);
  for (const key of Object.keys(values[chosen])) if (Object.hasOwn(given, key)) values[chosen][key] = given[key];
  for (const key of SHARED) if (Object.hasOwn(given, key)) share(key, given[key], chosen);
  return chosen;
}

const SHARED = ["model", "machine"]; // what somebody names under one question is meant under all of them

function share(key, value, from) {
  for (const [name, { fields }] of Object.entries(first.form.tabs)) {
    if (name === from || !fields[key]) continue;
    values[name] ??= fresh(name);
    if (values[name][key] === value) continue;
    values[name][key] = value;
    for (const other of fields[key].clears ?? []) values[name][other] = "";
  }
}

function writeAddress() {
  const start = fresh(tab);
  const changed = Object.entries(values[tab]).filter(([key, value]) => key !== "drag" && (value !== start[key] || SHARED.includes(key)));
  const query = new URLSearchParams(changed).toString();
  history.replaceState(null, "", `#${tab}${query ? "?" + query : ""}`);
}

// ---------------------------------------------------------------------------------------------------------------------
// Python, in a worker: one question at a time, and of those that come meanwhile only the last

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let ready = false, broken = "", asked = 0, busy = false, waiting = null;

worker.onmessage = ({ data: [id, said] }) => {
  if (id === "ready") ready = true;
  else if (id === "broken") broken = said;
  else {
    busy = false;
    if (id === asked && !waiting) show(said, dragging);
  }
  sayState();
  if (waiting && !busy) send();
};
worker.onerror = () => {
  broken ||= location.protocol === "file:"
    ? "a browser lets no page from a file start it; serve this folder, for instance with python3 -m http.server"
    : "its files did not load";
  sayState();
};

function ask() {
  waiting = [++asked, tab, { ...values[tab] }];
  if (!busy) send();
}

function send() {
  worker.postMessage(waiting);
  waiting = null;
  busy = true;
  setTimeout(sayState, 200);
}

function sayState() {
  $("state").textContent = broken
    ? `Python did not start here (${broken}), so this page only shows its first answers.`
    : !ready ? "Python is starting; the first answers are there already …" : busy ? "working …" : "";
  document.body.dataset.state = broken ? "broken" : !ready ? "starting" : busy || waiting ? "working" : "idle";
}

// ---------------------------------------------------------------------------------------------------------------------
// The answer

function show(answer, grasped = false) {
  $("error").hidden = !answer.error;
  $("answer").classList.toggle("stale", Boolean(answer.error));
  if (answer.error) {
    $("error").textContent = answer.error;
    return;
  }
  shown = answer;
  $("verdict").className = answer.news;
  for (const part of ["headline", "facts", "text", "code"]) $(part).textContent = answer[part];
  // Pictures are bigkit's own SVG, in which text from outside is escaped.
  $("pictures").replaceChildren(...answer.pictures.map((svg) => make("div", { className: "picture", innerHTML: svg })));
  for (const [name, value] of Object.entries(answer.fields ?? {})) setters[name]?.(value);
  if (answer.fields && "custom" in values[tab]) {
    const custom = answer.fields.custom ?? "";
    $("planner").hidden = !custom;
    if (!grasped && values[tab].drag) { // what was dragged has become the map
      values[tab].custom = custom;
      values[tab].drag = "";
      writeAddress();
    }
  }
  for (const [name, last] of Object.entries(answer.last ?? {})) setters[name]?.(null, last);
}

// ---------------------------------------------------------------------------------------------------------------------
// A hand in the picture: tooltips everywhere, and under "Who holds what?" layers that can be dragged

let dragging = false, detach = () => {};
const before = []; // maps of one's own, to go back to

function drag({ key, onto, done }) {
  if (!dragging) before.push(values.plan.custom);
  dragging = !done;
  values.plan.drag = onto ? `${key}>${onto}` : "";
  ask();
}

function take(custom) {
  values.plan.custom = custom;
  values.plan.drag = "";
  writeAddress();
  ask();
}

function touch() {
  detach();
  const undo = () => before.length && take(before.pop());
  const choose = ({ key }) => key.startsWith("way:") && change("way", key.split(":")[1]);
  detach = attach($("pictures"), tab === "plan" ? { onDrag: drag, onUndo: undo } : { onClick: choose });
}

// ---------------------------------------------------------------------------------------------------------------------
// Fields. Each kind gives its element, and may give a setter for what an answer says of it

let setters = {};

function change(name, value) {
  values[tab][name] = value;
  for (const other of first.form.tabs[tab].fields[name].clears ?? []) values[tab][other] = "";
  if (SHARED.includes(name)) share(name, value, tab);
  writeAddress();
  ask();
}

const kinds = {
  text(name, field, id) {
    const input = make("input", { id, value: values[tab][name], spellcheck: false });
    if (field.list) input.setAttribute("list", field.list);
    input.onchange = () => change(name, input.value);
    input.oninput = (event) => {
      // a choice from the list comes without a key; typing waits for Enter or for the next field
      if (field.list && !(event instanceof InputEvent && event.inputType?.startsWith("insertText"))) {
        if ([...$(field.list).options].some((option) => option.value === input.value)) change(name, input.value);
      }
    };
    return input;
  },
  number(name, field, id) {
    const input = make("input", { id, type: "number", value: values[tab][name], min: field.min, max: field.max });
    input.step = field.any ? "any" : 1;
    input.oninput = () => change(name, input.value);
    setters[name] = (value) => { if (document.activeElement !== input) input.value = value; };
    if (!field.steps) return input;
    const slider = make("input", { type: "range", min: 0, max: field.steps.length - 1, step: 1 });
    slider.setAttribute("aria-label", field.label);
    const place = () => {
      slider.value = field.steps.findLastIndex((step) => step <= Number(input.value));
      slider.setAttribute("aria-valuetext", input.value);
    };
    place();
    slider.oninput = () => { input.value = field.steps[slider.value]; place(); change(name, input.value); };
    input.addEventListener("input", place);
    return make("div", { className: "pair" }, slider, input);
  },
  select(name, field, id) {
    const options = field.options.map((option) => make("option", { value: option, textContent: option }));
    const select = make("select", { id }, ...options);
    select.value = values[tab][name];
    if (select.selectedIndex < 0) { // what a link says, and the menu does not have: the answer says so
      select.append(make("option", { value: values[tab][name], textContent: values[tab][name] }));
      select.value = values[tab][name];
    }
    select.onchange = () => change(name, select.value);
    return select;
  },
  check(name, field, id) {
    const input = make("input", { id, type: "checkbox", checked: values[tab][name] === "yes" });
    input.onchange = () => change(name, input.checked ? "yes" : "no");
    return input;
  },
  range(name, field, id) {
    const slider = make("input", { id, type: "range", min: field.min, max: field.max, step: 1, value: values[tab][name] });
    const number = make("input", { type: "number", min: field.min, max: field.max, value: values[tab][name] });
    number.setAttribute("aria-label", field.label);
    slider.oninput = () => { number.value = slider.value; change(name, slider.value); };
    number.oninput = () => { slider.value = number.value; change(name, number.value); };
    setters[name] = (value, last) => {
      if (last !== undefined) slider.max = number.max = last;
    };
    const pair = make("div", { className: "pair" }, slider, number);
    if (!field.play) return pair;
    const play = make("button", { type: "button", textContent: "Play", id: "play" });
    play.onclick = () => (player ? stop() : start());
    const start = () => {
      play.textContent = "Stop";
      if (Number(slider.value) >= Number(slider.max)) slider.value = 0;
      player = setInterval(() => {
        if (busy) return;
        if (Number(slider.value) >= Number(slider.max)) return stop();
        number.value = slider.value = Number(slider.value) + 1;
        change(name, slider.value);
      }, 350);
    };
    stop = () => { clearInterval(player); player = null; play.textContent = "Play"; };
    pair.prepend(play);
    return pair;
  },
  sliders(name, field) {
    const box = make("div");
    let sizes = [];
    setters[name] = (value) => {
      const next = value.split(",").filter(Boolean);
      if (box.children.length === next.length && box.contains(document.activeElement)) return; // in somebody's hand
      sizes = next;
      box.replaceChildren(...sizes.map((size, i) => {
        const max = Math.max(4, Math.min(field.max, 2 * Math.max(...sizes.map(Number))));
        const slider = make("input", { type: "range", min: 0, max, step: field.step, value: size });
        const number = make("input", { type: "number", min: 0, step: "any", value: size });
        for (const input of [slider, number]) input.setAttribute("aria-label", `GPU ${i}, GiB`);
        const set = (from, to) => () => {
          to.value = from.value;
          sizes[i] = from.value || "0";
          change(name, sizes.join(","));
        };
        slider.oninput = set(slider, number);
        number.oninput = set(number, slider);
        return make("div", { className: "pair" }, make("span", { textContent: `GPU ${i}` }), slider, number);
      }));
      if (!sizes.length) box.append(make("span", { textContent: "no GPU" }));
    };
    return box;
  },
};
let player = null, stop = () => {};

// ---------------------------------------------------------------------------------------------------------------------
// Tabs

function open(name) {
  stop();
  tab = name;
  values[tab] ??= fresh(tab);
  setters = {};
  for (const button of $("tabs").children) {
    const chosen = button.dataset.tab === tab;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", `tab-${tab}`);
  $("about").textContent = first.form.tabs[tab].about;
  const seen = Object.entries(first.form.tabs[tab].fields).filter(([, field]) => field.kind !== "hidden");
  const fields = seen.map(([key, field]) => {
    const control = kinds[field.kind](key, field, `field-${key}`);
    const label = make("label", { htmlFor: `field-${key}` });
    if (field.kind === "check") {
      label.append(control, field.label);
      return make("div", { className: "field inline" }, label);
    }
    label.textContent = field.label;
    return make("div", { className: "field" }, label, control);
  });
  $("fields").replaceChildren(...fields);
  $("planner").hidden = !values[tab].custom;
  touch();
  const start = fresh(tab);
  if (Object.entries(values[tab]).every(([key, value]) => value === start[key])) show(first.answers[tab]);
  else if (shown) $("answer").classList.add("stale"); // until its own answer comes
  ask();
  writeAddress();
  sayState();
}

function buildTabs() {
  const names = Object.keys(first.form.tabs);
  for (const name of names) {
    const button = make("button", { type: "button", id: `tab-${name}`, textContent: first.form.tabs[name].title });
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", "panel");
    button.dataset.tab = name;
    button.onclick = () => open(name);
    button.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = names[(names.indexOf(name) + step + names.length) % names.length];
      open(next);
      $(`tab-${next}`).focus();
    };
    $("tabs").append(button);
  }
}

$("planner").onclick = () => { before.push(values.plan.custom); take(""); };
$("form").onsubmit = (event) => event.preventDefault();
$("reset").onclick = () => { values[tab] = fresh(tab); open(tab); };
$("link").onclick = async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $("state").textContent = "The link is copied.";
  } catch {
    prompt("The link to this state:", location.href);
  }
};
$("save").onclick = () => {
  if (!shown) return;
  const url = URL.createObjectURL(new Blob([shown.pictures[0]], { type: "image/svg+xml" }));
  make("a", { href: url, download: `bigkit-${tab}.svg` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const followTheme = () => document.documentElement.classList.toggle("bigkit-dark", dark.matches);
dark.onchange = followTheme;
followTheme();
onhashchange = () => open(readAddress());

first = await (await fetch(new URL("first.json", import.meta.url))).json();
for (const [name, about] of first.form.models) $("models").append(make("option", { value: name, textContent: about }));
for (const name of first.form.machines) $("machines").append(make("option", { value: name }));
buildTabs();
open(readAddress());
