/* ---- what the other parts share: the page's elements, its packed texts, light and dark ---- */
const root = document.documentElement;
const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

/* A packed text: gzip in base64, in an element of its own; unpacked by the browser itself. */
const unpacked = async (id) => {
  const coded = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

/* Figures, boards and excerpts: the page's packed data by the place that an element names. */
const data = JSON.parse(await unpacked("data"));
const held = (place) => data[Number(place.dataset.held)];

/* The reader's choice of light or dark, kept where the browser keeps anything for a file, else the system's. */
const system = window.matchMedia("(prefers-color-scheme: dark)");
const kept = (() => { try { return window.localStorage; } catch { return null; } })();
let chosenTheme = kept && kept.getItem("stepscope-theme");
const themed = [];
const applyTheme = () => {
  root.dataset.theme = chosenTheme || (system.matches ? "dark" : "light");
  themed.forEach((redraw) => redraw());
};
document.getElementById("theme").addEventListener("click", () => {
  chosenTheme = root.dataset.theme === "dark" ? "light" : "dark";
  if (kept) kept.setItem("stepscope-theme", chosenTheme);
  applyTheme();
});
system.addEventListener("change", applyTheme);
