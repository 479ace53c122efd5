// Nothing is wider than the page, cut off, or to be scrolled; no text lies under something else.

function checkPage() {
  const root = document.documentElement;
  for (const element of [root, document.body]) {
    if (element.scrollWidth > root.clientWidth + 1) {
      report("page too wide", element, "", `${element.scrollWidth} px in ${root.clientWidth}`);
      return;
    }
  }
}

// A drawer waits wholly beyond the left edge, or is fixed beyond the right one.
const waits = (box, element) => box.right <= 1 || (box.left >= innerWidth - 1 && isFixed(element));
const beyond = (box) => box.left < -1.5 || box.right > innerWidth + 1.5;

function checkEdges() {
  const blamed = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!isSeen(element) || element.closest(SILENT)) continue;
    const raw = boxOf(element);
    if (!beyond(raw) || raw.width === 0 || raw.height === 0 || waits(raw, element)) continue;
    if (blamed.some((other) => other.contains(element))) continue;
    const box = shown(raw, cutsOutside(element));
    if (!box || isEmpty(box) || !beyond(box)) continue;
    blamed.push(element);
    const reach = `from ${Math.round(box.left)} to ${Math.round(box.right)} px`;
    report("beyond the edge", element, element.textContent, reach);
  }
  for (const node of TEXTS) {
    const parent = node.parentElement;
    if (blamed.some((other) => other.contains(parent))) continue;
    for (const line of linesOf(node)) {
      if (waits(line, parent)) continue;
      const box = shown(line, cutsInside(parent));
      if (box && !isEmpty(box) && beyond(box)) {
        blamed.push(parent);
        report("beyond the edge", parent, node.data, `text to ${Math.round(box.right)} px`);
        break;
      }
    }
  }
}

function checkClipped() {
  for (const node of TEXTS) {
    for (const line of linesOf(node)) {
      const box = shown(line, cutsInside(node.parentElement));
      if (box && box.by) {
        const what = box.by === node.parentElement ? "by its own box" : `by ${pathOf(box.by)}`;
        report("cut off", node.parentElement, node.data, what);
        break;
      }
    }
  }
}

function checkScrolling() {
  for (const element of document.body.querySelectorAll("*")) {
    if (element.scrollWidth <= element.clientWidth + 1 || !isSeen(element) || element.clientWidth < 3) continue;
    if (!/auto|scroll/.test(styleOf(element).overflowX)) continue;
    const needs = `${element.scrollWidth} px in ${element.clientWidth}`;
    const text = element.innerText;
    const wide = [...element.querySelectorAll("*")].filter((x) => boxOf(x).width > element.clientWidth + 1);
    const holds = (what) => element.closest(what) || wide.some((x) => x.matches(what) || x.closest(what));
    if (!NARROW) report("must be scrolled", element, text, needs);
    else if (holds("table, pre, code, .highlight")) {
      if (!element.hasAttribute("tabindex")) report("must be scrolled", element, text, `${needs}, not by keyboard`);
    } else if (wide.some((x) => x.matches(FORMULA)) || element.matches(FORMULA)) {
      report("must be scrolled", element, text, `a formula, ${needs}`);
    } else report("must be scrolled", element, text, needs);
  }
}

const meets = (a, b) => ({
  x: Math.min(a.right, b.right) - Math.max(a.left, b.left),
  y: Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top),
});

function paints(element) {
  if (element.matches("button, img, svg, canvas, video, input, select")) return true;
  const style = styleOf(element);
  return opacityOf(style.backgroundColor) > 0.05 || style.backgroundImage !== "none";
}

// Boxes that lie over the page. A button counts even while it is faint; what sticks or is fixed moves over the text
// only when one scrolls.
function overlays() {
  const all = [];
  for (const element of document.body.querySelectorAll("*")) {
    const isButton = element.localName === "button";
    const style = styleOf(element);
    if (style.position !== "absolute" && !isButton) continue;
    if (!(isButton ? element.checkVisibility({ visibilityProperty: true }) : isSeen(element))) continue;
    if (Number(style.zIndex) < 0 || !paints(element) || isFloating(element)) continue;
    const box = shown(boxOf(element), cutsOutside(element));
    if (box && !isEmpty(box)) all.push({ element, box });
  }
  return all;
}

function checkOverlaps() {
  const rows = new Map();
  const lines = [];
  for (const node of TEXTS) {
    const parent = node.parentElement;
    if (isFloating(parent)) continue;
    for (const line of linesOf(node)) {
      const box = shown(line, cutsInside(parent));
      if (!box || isEmpty(box) || box.right < 0) continue;
      const entry = { node, parent, box, whole: parent.closest("math, svg, mjx-container, .katex") };
      lines.push(entry);
      for (let row = Math.floor(box.top / 64); row <= Math.floor(box.bottom / 64); row++) {
        if (!rows.has(row)) rows.set(row, []);
        rows.get(row).push(entry);
      }
    }
  }
  const blamed = new Set();
  for (const { element, box } of overlays()) {
    for (let row = Math.floor(box.top / 64); row <= Math.floor(box.bottom / 64); row++) {
      const under = (rows.get(row) ?? []).find(({ parent, box: text }) => {
        const { x, y } = meets(box, text);
        return x > 1.5 && y > 2 && !element.contains(parent);
      });
      if (under && ![...blamed].some((other) => other.contains(element))) {
        blamed.add(element);
        report("text under something", under.parent, under.node.data, `under ${pathOf(element)}`);
      }
    }
  }
  for (const row of rows.values()) {
    row.sort((a, b) => a.box.left - b.box.left);
    for (let i = 0; i < row.length; i++) {
      for (let j = i + 1; j < row.length && row[j].box.left < row[i].box.right; j++) {
        const [a, b] = [row[i], row[j]];
        if (a.node === b.node || (a.whole && a.whole === b.whole)) continue;
        const { x, y } = meets(a.box, b.box);
        const height = Math.min(a.box.bottom - a.box.top, b.box.bottom - b.box.top);
        if (x > 2 && y > 0.5 * height && !blamed.has(a.parent) && !blamed.has(b.parent)) {
          blamed.add(a.parent);
          report("text under something", a.parent, a.node.data, `and “${short(b.node.data)}”`);
        }
      }
    }
  }
}
