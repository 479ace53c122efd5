// No name is broken inside a word, and no formula is shown as its source.

const LETTER = /[\p{L}\p{N}]/u;
const STARTS = /[\p{L}\p{N}_]/u;

function rectAt(node, index) {
  range.setStart(node, index);
  range.setEnd(node, index + 1);
  const boxes = range.getClientRects();
  return boxes.length ? boxes[boxes.length - 1] : null;
}

const isLower = (a, b) => a && b && b.top > a.top + 0.5 * a.height && b.left < a.right;

// A break may follow a separator or a space, and stand at <wbr> or a soft hyphen; not between letters and digits.
function checkWords() {
  let last = null;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  for (let at = walker.nextNode(); at; at = walker.nextNode()) {
    if (at.nodeType === 1) {
      // A tag inside a word leaves the word whole, unless it is a place to break.
      if (at.matches("wbr, br, img, svg, math") || !/^inline$|^contents$/.test(styleOf(at).display)) last = null;
      continue;
    }
    const parent = at.parentElement;
    if (!at.data || parent.closest(SILENT) || parent.closest("math, svg") || !isSeen(parent)) {
      if (at.data.trim()) last = null;
      continue;
    }
    if (last && last.block === blockOf(parent) && LETTER.test(last.node.data.at(-1)) && STARTS.test(at.data[0])) {
      if (isLower(rectAt(last.node, last.node.data.length - 1), rectAt(at, 0))) {
        report("broken word", parent, `${last.node.data.slice(-30)}|${at.data.slice(0, 30)}`);
      }
    }
    last = { node: at, block: blockOf(parent) };
    const lines = linesOf(at);
    if (lines.length < 2) continue;
    for (const word of at.data.matchAll(/[^\s\u200b\u00ad]{2,}/g)) {
      range.setStart(at, word.index);
      range.setEnd(at, word.index + word[0].length);
      if (range.getClientRects().length < 2) continue;
      const cut = breakOf(at, word);
      if (cut) {
        report("broken word", parent, `${word[0].slice(0, cut)}|${word[0].slice(cut)}`);
        break;
      }
    }
  }
}

function breakOf(node, word) {
  let before = rectAt(node, word.index);
  for (let i = 1; i < word[0].length; i++) {
    const box = rectAt(node, word.index + i);
    if (isLower(before, box) && LETTER.test(word[0][i - 1]) && STARTS.test(word[0][i])) return i;
    before = box ?? before;
  }
  return 0;
}

const blockOf = remembered((element) =>
  styleOf(element).display.startsWith("inline") ? blockOf(element.parentElement) : element
);

const RAW = [
  /\\[()[\]]/,
  /\\[A-Za-z]+/,
  /[\^_]\{/,
  // Dollars around what is no amount: an amount starts with a digit.
  /(?<![\w$\\])\$(?=[^\s\d$])[^$\n]{0,200}?[^\s$]?\$(?![\w$])/,
  /(?<![\w$\\])\$\d[^$\n]{0,80}[\\^_=][^$\n]{0,80}\$(?![\w$])/,
];
const STAR = /[\p{L}\p{N})]\*{1,2}[\p{L}\p{N}(]|(?<![\p{L}\p{N}])[\p{L}\p{N}] \* [\p{L}\p{N}(]/u;

// Folded text counts as well: it is source whenever it is unfolded. The pages of the site may quote LaTeX as code; a
// report has nothing to quote, so that there a command within a line is a formula that was not set.
function checkFormulas(isReport) {
  const blame = (text, element) => {
    const raw = RAW.map((pattern) => pattern.exec(text)).find(Boolean);
    if (raw) report("raw formula", element, text.slice(Math.max(0, raw.index - 20), raw.index + 70));
    const star = STAR.exec(text);
    if (star) report("star for a product", element, text.slice(Math.max(0, star.index - 20), star.index + 70));
  };
  for (const node of TEXTS) {
    const parent = node.parentElement;
    if (!parent.closest(CODE)) blame(node.data, parent);
    else if (isReport && !parent.closest("pre")) {
      const command = /\\[A-Za-z]{2,}/.exec(node.data);
      if (command) report("raw formula", parent, node.data.slice(Math.max(0, command.index - 20)));
    }
  }
  blame(document.title, document.querySelector("title") ?? document.documentElement);
  for (const name of ["title", "alt", "aria-label"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) blame(element.getAttribute(name), element);
  }
  for (const element of document.querySelectorAll("merror, mjx-merror, .katex-error")) {
    report("raw formula", element, element.textContent, "an error in the formula");
  }
}
