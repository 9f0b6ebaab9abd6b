// Pictures that answer to a hand: tooltips at once, clicks, drags, undo, by pointer, finger and keyboard.
//
//     import { attach } from "./touch.js";
//     const detach = attach(element, {
//       onClick: ({ key }) => …,               // a mark was clicked, or Enter pressed on it
//       onDrag: ({ key, onto, done }) => …,    // a mark is over another (onto: its key); done: it was let go
//       onUndo: () => …,                       // Ctrl-Z or Cmd-Z
//     });
//
// `element` holds an <svg>, which may be replaced at any time. What can be pointed at are its marks (`Mark` in
// draw/canvas.py): <rect data-key="layer:3"><title>a sentence</title></rect>. A mark with data-onto="device layer" can be
// dragged onto marks whose keys begin so; data-along="x" takes the nearest of these from left to right, wherever the
// pointer is; data-at is the key of the one where it is now. A drag that ends nowhere has the `onto` null.
//
// A drag aims at the marks as they stood when it began: pictures that come meanwhile may move them, and what arrives late
// changes nothing. Only where nothing stood then does the newest picture count.
//
// Keys: arrows go from mark to mark, Enter clicks, Shift with arrows drags to the next place, Escape ends it.
//
// Leaves out: what follows. Below `attach` is what Jupyter needs (https://anywidget.dev); it needs no other library.

const NEAR = 4; // pixels that a hand may shake in a click
const AHEAD = 3; // places of a drag that are said before the picture of the first has come
const PATIENCE = 250; // ms to wait for it

export function attach(element, { onClick, onDrag, onUndo } = {}) {
  const page = element.ownerDocument;
  const tip = page.createElement("div");
  let here = null; // key of the mark that is pointed at
  let held = null; // what is being dragged: { key, onto, x, y, moving, stood }
  let pointer = null; // where the pointer is; null when the keyboard was used last
  let awaited = []; // when the places were said whose pictures are awaited

  tip.setAttribute("role", "status");
  tip.style.cssText =
    "position:fixed;z-index:10000;max-width:360px;padding:5px 9px;border-radius:4px;background:#222;color:#fff;" +
    "font:12px/1.4 system-ui,sans-serif;pointer-events:none;display:none;box-shadow:0 2px 8px #0006";
  page.body.append(tip);
  element.tabIndex = 0;
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", "Picture. Arrow keys go through its parts, Enter tells more" +
    (onDrag ? ", Shift with arrows moves a part, Control Z takes it back." : "."));
  element.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own keys wait meanwhile

  const marks = () => [...element.querySelectorAll("rect[data-key]")];
  const find = (key) => key && marks().find((mark) => mark.dataset.key === key);
  const fits = (mark, onto) => {
    const [kind, , ...part] = mark.dataset.key.split(":");
    return !part.length && onto.split(" ").includes(kind);
  };
  const at = (x, y) => (element.getRootNode().elementsFromPoint?.(x, y) ?? []).filter(
    (item) => element.contains(item) && item.dataset?.key);

  function outline(key, colour) {
    for (const mark of marks()) {
      const style = mark.dataset.key === key ? colour : "";
      if (mark.style.stroke !== style) mark.style.stroke = style;
      if (mark.dataset.key === key) mark.style.strokeWidth = "1.5";
    }
  }

  function show(mark, words) {
    here = mark ? mark.dataset.key : null;
    outline(held?.onto ?? here, held ? "#D55E00" : "currentColor");
    tip.style.display = mark ? "block" : "none";
    if (!mark) return;
    words ??= onDrag && mark.dataset.onto ? `${mark.says} Drag to move it.` : mark.says;
    if (tip.textContent !== words) tip.textContent = words;
    const box = mark.getBoundingClientRect();
    const [x, y] = pointer ? [pointer.x + 12, pointer.y + 16] : [box.left, box.bottom + 6];
    tip.style.left = `${Math.max(4, Math.min(x, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + tip.offsetHeight > innerHeight ? (pointer ? pointer.y : box.top) - tip.offsetHeight - 8 : y}px`;
    element.style.cursor = held ? "grabbing" : mark.dataset.onto ? (mark.dataset.along ? "col-resize" : "grab") : "";
  }

  // The titles become tooltips that do not hesitate; those of the browser would come on top.
  function settle() {
    for (const mark of marks()) {
      mark.says ??= mark.querySelector("title")?.textContent ?? "";
      mark.querySelector("title")?.remove();
      if (onDrag && mark.dataset.onto) mark.style.touchAction = "none";
    }
    element.querySelector("svg > title")?.remove();
    awaited.shift();
    if (held?.moving) drag();
    else if (here && !held) show(pointer ? at(pointer.x, pointer.y)[0] : find(here));
  }

  // The key of the mark that the drag is over.
  function target() {
    const { x, y } = pointer;
    const off = ({ box }) => Math.max(box.left - x, x - box.right, 0);
    if (held.along) return held.stood.sort((a, b) => off(a) - off(b))[0]?.key ?? null;
    const over = ({ box }) => box.left <= x && x < box.right && box.top <= y && y < box.bottom;
    const other = (mark) => fits(mark, held.kinds) && mark.dataset.key !== held.key;
    return (held.stood.findLast(over)?.key ?? at(x, y).find(other)?.dataset.key) || null;
  }

  // Say where the drag is, but not much faster than pictures come.
  function drag() {
    const onto = target();
    const mark = find(onto);
    awaited = awaited.filter((since) => performance.now() - since < PATIENCE);
    if (onto !== held.onto && awaited.length < AHEAD) {
      held.onto = onto;
      awaited.push(performance.now());
      onDrag({ key: held.key, onto, done: false });
    }
    show(mark ?? find(held.key), mark ? `→ ${mark.says}` : "Let go here to leave it where it was.");
  }

  function drop(cancelled) {
    const { key, moving } = held;
    const onto = cancelled || !moving ? null : target();
    held = null;
    awaited = [];
    element.style.cursor = "";
    if (moving) onDrag({ key, onto, done: true });
    show(null);
  }

  const does = {
    pointerdown(event) {
      const mark = at(event.clientX, event.clientY)[0];
      pointer = { x: event.clientX, y: event.clientY };
      element.focus({ preventScroll: true });
      if (!mark || event.button) return;
      const { key, onto, along } = mark.dataset;
      const kinds = (onDrag && onto) || "";
      const places = marks().filter((other) => other !== mark && fits(other, kinds));
      const stood = places.map((place) => ({ key: place.dataset.key, box: place.getBoundingClientRect() }));
      held = { key, kinds, along, x: pointer.x, y: pointer.y, onto: null, moving: false, stood };
      element.setPointerCapture?.(event.pointerId);
      event.preventDefault();
    },
    pointermove(event) {
      pointer = { x: event.clientX, y: event.clientY };
      if (!held) return show(at(pointer.x, pointer.y)[0]);
      held.moving ||= held.kinds && Math.hypot(pointer.x - held.x, pointer.y - held.y) > NEAR;
      if (held.moving) drag();
    },
    pointerup() {
      if (!held) return;
      const { key, moving } = held;
      drop(false);
      if (!moving) onClick?.({ key });
    },
    pointercancel: () => held && drop(true),
    wheel() {
      if (held && !held.along) held.stood = []; // the page scrolls under the hand
    },
    pointerleave() {
      if (held) return;
      pointer = null;
      show(null);
    },
    blur: () => show(null),
    focus: () => pointer || show(find(here) ?? marks()[0]),
    keydown(event) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const all = marks();
      const now = find(here);
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") onUndo?.();
      else if (event.key === "Escape") held ? drop(true) : show(null);
      else if (event.key === "Enter" || event.key === " ") now && onClick?.({ key: here });
      else if (event.key === "Home" || event.key === "End") jump(all.at(event.key === "End" ? -1 : 0));
      else if (step && event.shiftKey && now?.dataset.onto && onDrag) {
        const kind = now.dataset.onto.split(" ")[0];
        const places = all.filter((mark) => fits(mark, kind));
        const from = places.findIndex((mark) => mark.dataset.key === now.dataset.at);
        const onto = places[from + step - (now.dataset.along && step > 0 ? 1 : 0)];
        if (onto) onDrag({ key: here, onto: onto.dataset.key, done: true });
      } else if (step && !event.shiftKey) jump(now ? all[all.indexOf(now) + step] ?? now : all[0]);
      else return;
      event.preventDefault();
      event.stopPropagation();
    },
  };

  function jump(mark) {
    pointer = null;
    show(mark ?? null);
  }

  const redrawn = new MutationObserver((changes) => {
    if (changes.some((change) => [...change.addedNodes].some((node) => node.querySelector || node.nodeName === "svg")))
      settle();
  });
  redrawn.observe(element, { childList: true, subtree: true });
  for (const [name, handler] of Object.entries(does)) element.addEventListener(name, handler);
  settle();
  return () => {
    redrawn.disconnect();
    tip.remove();
    for (const [name, handler] of Object.entries(does)) element.removeEventListener(name, handler);
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Jupyter

// Sliders say the name and the text of the field above them, not the number of their step.
function nameSliders(panel) {
  for (const number of panel.querySelectorAll(".bigkit-number")) {
    const handle = number.querySelector("[role=slider]");
    const name = number.querySelector("label")?.textContent;
    const words = number.querySelector("input[type=text]")?.value;
    if (handle && name && handle.getAttribute("aria-label") !== name) handle.setAttribute("aria-label", name);
    if (handle && words && handle.getAttribute("aria-valuetext") !== words) handle.setAttribute("aria-valuetext", words);
  }
}

// Panes open with the keyboard too.
function namePanes(panel) {
  for (const head of panel.querySelectorAll("[class*=Collapse-header]")) {
    head.tabIndex = 0;
    head.setAttribute("role", "button");
    head.setAttribute("aria-expanded", `${Boolean(head.closest("[class*=Collapse-open]"))}`);
  }
}

const panel = {
  // The notebook's own keys wait while a control has the focus: x would cut the cell, and an arrow would leave it.
  keydown(event) {
    const head = event.target.closest("[class*=Collapse-header]");
    if (head && (event.key === "Enter" || event.key === " ")) {
      head.click();
      event.preventDefault();
    }
    const runs = event.shiftKey && event.key === "Enter";
    if (!event.ctrlKey && !event.metaKey && !event.altKey && !runs) event.stopPropagation();
  },
  // What a button opens comes into view.
  click({ currentTarget, target }) {
    const show = () => currentTarget.querySelector("[class*=Collapse-open]")?.scrollIntoView({ block: "nearest" });
    if (["Code", "Export"].includes(target.closest(".bigkit-buttons button")?.textContent)) setTimeout(show, 300);
  },
};

export default {
  render({ model, el }) {
    const draw = () => (el.innerHTML = model.get("value"));
    const send = (kind) => (event) => model.send({ kind, ...event });
    const touched = model.get("draggable") ? { onDrag: send("drag") } : {};
    draw();
    model.on("change:value", draw);
    const detach = attach(el, { onClick: send("click"), onUndo: send("undo"), ...touched });
    let around = null;
    const names = setInterval(() => {
      if (!around && (around = el.closest(".bigkit-explorer")))
        for (const [name, handler] of Object.entries(panel)) around.addEventListener(name, handler);
      if (around) nameSliders(around), namePanes(around);
    }, 1000);
    return () => {
      clearInterval(names);
      detach();
      model.off("change:value", draw);
    };
  },
};
