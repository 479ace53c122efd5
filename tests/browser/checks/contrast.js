// Every text stands out from what is behind it: 4.5 to 1, or 3 to 1 if it is large (WCAG 2.2, 1.4.3).

const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

// Any CSS colour as red, green, blue and opacity.
const colourOf = remembered((text) => {
  const plain = /^rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)$/.exec(text);
  if (plain) return [+plain[1], +plain[2], +plain[3], plain[4] === undefined ? 1 : +plain[4]];
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = "#000";
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
});

function opacityOf(text) {
  return colourOf(text)[3];
}

const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];

function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map((x) => {
    const part = x / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function ratio(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

// The colour of an empty page, which follows the colour scheme.
const PAPER = (() => {
  const probe = document.createElement("i");
  probe.style.color = "Canvas";
  document.documentElement.append(probe);
  const colour = colourOf(getComputedStyle(probe).color);
  probe.remove();
  return colour;
})();

// What is behind the content of an element, or null behind which a picture lies.
const groundOf = remembered((element) => {
  const style = styleOf(element);
  if (style.backgroundImage !== "none") return null;
  const own = colourOf(style.backgroundColor);
  if (own[3] > 0.995) return own;
  const behind = element.parentElement ? groundOf(element.parentElement) : PAPER;
  return behind && (own[3] > 0 ? over(own, behind) : behind);
});

const fadeOf = remembered(
  (element) => Number(styleOf(element).opacity) * (element.parentElement ? fadeOf(element.parentElement) : 1)
);

// In a drawing the last filled shape around the text is behind it.
function drawnBehind(text, ground) {
  const inner = boxOf(text);
  let behind = ground;
  for (const shape of text.ownerSVGElement.querySelectorAll("rect, path, polygon, circle, ellipse")) {
    if (!(shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) break;
    const style = styleOf(shape);
    if (style.fill === "none" || style.fill.startsWith("url") || Number(style.fillOpacity) < 0.99) continue;
    const box = boxOf(shape);
    const aroundX = box.left <= inner.left + 1 && box.right >= inner.right - 1;
    const aroundY = box.top <= inner.top + 1 && box.bottom >= inner.bottom - 1;
    if (aroundX && aroundY && isSeen(shape)) behind = colourOf(style.fill);
  }
  return behind;
}

const inWords = (colour) => `rgb(${colour.slice(0, 3).map(Math.round).join(" ")})`;

// In the dark the paper is dark, and in the light it is light.
function checkScheme() {
  const ground = groundOf(document.body);
  if (!ground) return;
  const isDark = luminance(ground) < 0.18;
  const wantsDark = matchMedia("(prefers-color-scheme: dark)").matches;
  if (isDark !== wantsDark) report("ignores the scheme", document.body, "", `the paper is ${inWords(ground)}`);
}

// One fault for each pair of colours.
function checkContrast() {
  const blamed = new Set();
  for (const node of TEXTS) {
    const element = node.parentElement;
    if (!linesOf(node).length || element.closest(":disabled")) continue;
    const style = styleOf(element);
    const isDrawn = element.namespaceURI.endsWith("svg");
    let ground = groundOf(element);
    if (!ground) continue;
    if (isDrawn) ground = drawnBehind(element.closest("text") ?? element, ground);
    if (isDrawn && !/^(rgb|#|color|okl|hsl|lab|lch)/.test(style.fill)) continue;
    const [r, g, b, a] = colourOf(isDrawn ? style.fill : style.color);
    const ink = over([r, g, b, a * fadeOf(element)], ground);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const seen = ratio(ink, ground);
    if (seen >= (large ? 3 : 4.5) - 0.005) continue;
    const pair = `${inWords(ink)} on ${inWords(ground)}`;
    if (!blamed.has(pair)) report("low contrast", element, node.data, `${seen.toFixed(2)} to 1, ${pair}`);
    blamed.add(pair);
  }
}
