// What the checks share: which elements are seen, what clips them, and where the lines of a text stand.

const found = [];
const NARROW = innerWidth < 600;
const SILENT = "script, style, noscript, template, title, textarea, select, annotation, annotation-xml";
const CODE = "code, pre, kbd, samp, tt";
const FORMULA = "math, mjx-container, .katex, .arithmatex, .formula";

const short = (text) => {
  const one = String(text).replace(/\s+/g, " ").trim();
  return one.length > 90 ? one.slice(0, 87) + "…" : one;
};

function report(kind, element, text, detail = "") {
  found.push({ kind, where: pathOf(element), text: short(text), detail: short(detail) });
}

// A CSS path, from the nearest id.
function pathOf(element) {
  const parts = [];
  for (let at = element; at && at.nodeType === 1 && parts.length < 8; at = at.parentElement) {
    if (at.id && parts.length) {
      parts.unshift("#" + CSS.escape(at.id));
      break;
    }
    const name = at.localName;
    const twins = at.parentElement ? [...at.parentElement.children].filter((x) => x.localName === name) : [at];
    parts.unshift(twins.length > 1 ? `${name}:nth-of-type(${twins.indexOf(at) + 1})` : name);
  }
  return parts.join(" > ");
}

function remembered(compute) {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) known.set(key, compute(key));
    return known.get(key);
  };
}

const styleOf = remembered((element) => getComputedStyle(element));
const isSeen = remembered((element) =>
  element.checkVisibility({ opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: false })
);
const boxOf = remembered((element) => element.getBoundingClientRect());

const isPositioned = (style) =>
  style.position !== "static" || style.transform !== "none" || style.filter !== "none" || style.contain === "paint";

// What cuts the content of an element, from inside to outside, as `{box, x, y, element}`; x and y are `hidden`,
// `scroll` or null. The root does not count: what it cuts is beyond the edge of the page.
const cutsInside = remembered((element) => {
  const style = styleOf(element);
  const mode = (value) => (/auto|scroll/.test(value) ? "scroll" : /hidden|clip/.test(value) ? "hidden" : null);
  const cut = { element, x: mode(style.overflowX), y: mode(style.overflowY) };
  const inline = style.display === "inline" && element.localName !== "svg";
  if (inline || (!cut.x && !cut.y) || element === document.body || element === document.documentElement) {
    return cutsOutside(element);
  }
  const box = boxOf(element);
  cut.box = {
    left: box.left + element.clientLeft,
    top: box.top + element.clientTop,
    right: element.clientWidth ? box.left + element.clientLeft + element.clientWidth : box.right,
    bottom: element.clientHeight ? box.top + element.clientTop + element.clientHeight : box.bottom,
  };
  return [cut, ...cutsOutside(element)];
});

const cutsOutside = remembered((element) => {
  const position = styleOf(element).position;
  if (position === "fixed") return [];
  let parent = element.parentElement;
  if (position === "absolute") {
    while (parent && !isPositioned(styleOf(parent))) parent = parent.parentElement;
  }
  return parent ? cutsInside(parent) : [];
});

const isFloating = remembered((element) => {
  const position = styleOf(element).position;
  if (position === "fixed" || position === "sticky") return true;
  return element.parentElement ? isFloating(element.parentElement) : false;
});

const isFixed = remembered(
  (element) => styleOf(element).position === "fixed" || (element.parentElement ? isFixed(element.parentElement) : false)
);

const isEmpty = (box) => box.right - box.left <= 0 || box.bottom - box.top <= 0;

// What is left of a box after all cuts, or null; `by` is the first element that hides a part of it for good.
function shown(rect, cuts) {
  const box = { left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom };
  let by = null;
  for (const cut of cuts) {
    const around = cut.box;
    // Boxes of a pixel hold text for screen readers, and folded ones have no height.
    if (around.right - around.left < 3 || around.bottom - around.top < 3) return null;
    const height = box.bottom - box.top;
    const beyondX = box.left < around.left - 1.5 || box.right > around.right + 1.5;
    const beyondY = box.top < around.top - 0.35 * height || box.bottom > around.bottom + 0.35 * height;
    if (((cut.x === "hidden" && beyondX) || (cut.y === "hidden" && beyondY)) && !by) by = cut.element;
    if (cut.x) {
      box.left = Math.max(box.left, around.left);
      box.right = Math.min(box.right, around.right);
    }
    if (cut.y) {
      box.top = Math.max(box.top, around.top);
      box.bottom = Math.min(box.bottom, around.bottom);
    }
    if (isEmpty(box)) return by ? { ...box, by } : null;
  }
  return { ...box, by };
}

function textsIn(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const nodes = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.data.trim() && !node.parentElement.closest(SILENT)) nodes.push(node);
  }
  return nodes;
}

const TEXTS = textsIn(document.body);
const range = document.createRange();

// The lines of a text node that is seen, as boxes.
const linesOf = remembered((node) => {
  if (!isSeen(node.parentElement)) return [];
  range.selectNodeContents(node);
  return [...range.getClientRects()].filter((box) => box.width > 0.5 && box.height > 0.5);
});
