/* ---- excerpts: tokens in their responses, chosen by lists or by a click in a figure of the panel ---- */
all(".excerpts").forEach((box) => {
  const spec = held(box);
  const choice = (label, values) => {
    const select = element("select", { onchange: () => fill() }, element("option", { value: "", textContent: "all" }),
      ...values.map((value) => element("option", { value, textContent: value })));
    box.querySelector(".controls").append(element("label", {}, label + " ", select));
    return select;
  };
  const step = choice("Step", spec.steps.map(String)), kind = choice("Class", spec.classes);
  const fill = () => {
    const rows = spec.rows
      .filter((row) => (!step.value || String(row[0]) === step.value) && (!kind.value || row[1] === kind.value))
      .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, spec.most);
    box.querySelector(".found").replaceChildren(...rows.map(([, , , facts, prompt, at, tokens]) => element("div", { className: "excerpt" },
      element("p", { className: "facts-line", textContent: facts }),
      element("p", { className: "tokens" }, element("span", { className: "asked", textContent: prompt + " " }),
        ...tokens.map(([text, level], k) => element("span", {
          className: "t" + (level ? " " + (level < 0 ? "n" : "p") + Math.abs(level) : "") + (k === at ? " mark" : ""), textContent: text }))))),
      ...(rows.length ? [] : [element("p", { className: "caption", textContent: "No token of this choice is among those kept on the page; all are in ledger.parquet." })]));
  };
  box.choose = (picked) => {
    step.value = spec.steps.includes(picked[0]) ? String(picked[0]) : "";
    kind.value = spec.classes.includes(picked[1]) ? picked[1] : "";
    fill();
    box.scrollIntoView({ block: "nearest" });
  };
  fill();
});
/* A click in a figure chooses tokens of its panel, by excerpts or in the linked view, or leads to a place. */
const choosing = (div) => {
  if (div.choosing) return;
  div.choosing = true;
  const panel = div.closest(".measurement"), box = panel && panel.querySelector(".excerpts"), view = panel && panel.querySelector(".explore");
  div.on("plotly_click", (event) => {
    const picked = event.points[0].customdata;
    if (typeof picked === "string" && picked.startsWith("#")) location.hash = picked;
    else if (!Array.isArray(picked)) return;
    else if (box) box.choose(picked);
    else if (view && held(view).classes.quadrant.labels.includes(picked[0])) location.hash = `#${view.dataset.key}?class=${encodeURIComponent(picked[0])}`;
  });
};
