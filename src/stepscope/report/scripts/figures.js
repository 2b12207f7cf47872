/* ---- figures: colours are CSS variables, resolved for the theme at hand ---- */
const known = {};
const cssVariables = (theme) => {
  if (known[theme]) return known[theme];
  const before = root.dataset.theme;
  root.dataset.theme = theme;
  const style = getComputedStyle(root);
  const values = {};
  ["paper", "panel", "ink", "muted", "rule", "grid", "link", "blue", "vermillion", "green", "purple", "ochre", "brown", "ink-soft", "muted-soft", "green-soft", "purple-soft", "ochre-soft", "brown-soft", "sans"].forEach(
    (name) => { values[name] = style.getPropertyValue("--" + name).trim(); });
  root.dataset.theme = before;
  known[theme] = values;
  return values;
};
const resolve = (value, vars) => {
  if (typeof value === "string") return value.replace(/^var\(--([a-z-]+)\)$/, (_, name) => vars[name]);
  if (Array.isArray(value)) return value.map((item) => resolve(item, vars));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, vars)]));
  return value;
};
const specOf = (div, theme, width) => {
  const vars = cssVariables(theme);
  const spec = resolve(held(div), vars);
  const narrow = width < 560, small = narrow ? 11 : 12;
  const axis = {
    gridcolor: vars.grid, linecolor: vars.muted, zeroline: false, zerolinecolor: vars.muted, zerolinewidth: 1, showline: true,
    ticks: "outside", tickcolor: vars.muted, tickfont: { size: small }, automargin: true,
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, hovermode: "closest",
    font: { family: vars.sans, size: small, color: vars.ink },
    margin: { l: narrow ? 50 : 64, r: 14, t: narrow && spec.layout.showlegend !== false ? 64 : 40, b: 46 },
    legend: { traceorder: "normal", orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left" },
    hoverlabel: { align: "left", bgcolor: vars.panel, bordercolor: vars.muted, font: { color: vars.ink, family: vars.sans } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: vars.muted, activecolor: vars.link },
    ...spec.layout,
  };
  Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach((key) => {
    layout[key] = { ...axis, ...layout[key] };
    if (layout[key].title) layout[key].title = { standoff: 8, ...layout[key].title, font: { size: small + 1 } };
  });
  return { data: spec.data, layout };
};
let loading = null;
const library = () => (loading ??= unpacked("plotly").then((source) => {
  document.head.append(element("script", { textContent: source }));
}));
const save = async (div, format) => {
  await library();
  const width = Math.max(640, div.clientWidth), height = div.clientHeight;
  const spec = specOf(div, "light", width);
  spec.layout = { ...spec.layout, width, height, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" };
  return Plotly.downloadImage(spec, { format, width, height, scale: format === "png" ? 2 : 1, filename: "stepscope-" + div.dataset.name });
};
const draw = async (div) => {
  await library();
  const spec = specOf(div, root.dataset.theme, div.clientWidth);
  div.classList.add("drawn");
  await Plotly.react(div, spec.data, spec.layout, {
    responsive: true, displaylogo: false, displayModeBar: !div.closest(".answer"), plotlyServerURL: "",
    modeBarButtons: [[
      "zoom2d", "resetScale2d",
      { name: "svg", title: "Save as SVG", icon: Plotly.Icons.disk, click: () => save(div, "svg") },
      { name: "png", title: "Save as PNG", icon: Plotly.Icons.camera, click: () => save(div, "png") },
    ]],
  });
  choosing(div);
};
const watcher = new IntersectionObserver((entries) => {
  entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    watcher.unobserve(entry.target);
    draw(entry.target);
  });
}, { rootMargin: "800px" });
all("[data-export]").forEach((button) => button.addEventListener("click", () =>
  save(button.closest("figure").querySelector(".canvas"), button.dataset.export)));
