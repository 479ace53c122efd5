// Everything that the page names: links to follow, and resources that it needs.

function links() {
  const all = [];
  const add = (element, name, kind) => {
    const value = element.getAttribute(name);
    if (value === null) return;
    let url = null;
    try {
      url = new URL(value.trim(), document.baseURI).href;
    } catch {
      // Not well-formed: the URL stays null.
    }
    all.push({ kind, value, url, where: pathOf(element), text: short(element.textContent) });
  };
  for (const element of document.querySelectorAll("a, area")) {
    add(element, "href", "link");
    add(element, "xlink:href", "link");
  }
  for (const element of document.querySelectorAll("link[href]")) {
    const needed = /stylesheet|icon|preload|manifest|modulepreload/.test(element.rel);
    add(element, "href", needed ? "resource" : "link");
  }
  for (const element of document.querySelectorAll("[src]")) add(element, "src", "resource");
  for (const element of document.querySelectorAll("object[data]")) add(element, "data", "resource");
  for (const element of document.querySelectorAll("use, image")) {
    add(element, "href", "resource");
    add(element, "xlink:href", "resource");
  }
  return all;
}

const identifiers = () => [...document.querySelectorAll("[id], a[name]")].flatMap((x) => [x.id, x.name]).filter(
  (name) => typeof name === "string" && name
);
