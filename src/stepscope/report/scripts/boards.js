/* ---- boards: tables whose rows the reader chooses ---- */
const shown = (value) => value === null || value === undefined ? "–" : (Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(1) : value.toFixed(3)).replace("-", "−");
const boardCell = (column, value, note) => {
  const cell = element("td");
  if (column.err) {
    const [number, error] = value || [null, null];
    cell.className = "num";
    cell.dataset.v = number === null ? "nan" : number;
    if (error !== null && error !== undefined) cell.dataset.e = error;
    cell.textContent = number === null ? "–" : error === null ? shown(number) : shown(number) + "\u00a0±\u00a0" + shown(error);
  } else if (note) {
    cell.dataset.v = value;
    const name = element("span", { textContent: value, tabIndex: 0, className: "named" });
    name.dataset.tip = note;
    cell.append(name);
  } else {
    cell.dataset.v = cell.textContent = value;
  }
  return cell;
};
all(".board").forEach((board) => {
  const spec = held(board);
  const body = board.querySelector("tbody"), head = element("tr");
  spec.columns.forEach((column) => {
    const th = element("th", { scope: "col", className: column.err ? "num" : "" }, element("button", { type: "button", textContent: column.name }));
    th.dataset.label = column.name;
    if (column.err) th.dataset.err = "";
    if (column.anchor) {
      const link = element("a", { className: "def", href: "#" + column.anchor, textContent: "?" });
      link.setAttribute("aria-label", "Definition: " + column.name);
      th.append(link);
    }
    head.append(th);
  });
  board.querySelector("thead").append(head);
  const size = ([, cells]) => Math.abs((cells[spec.sort] || [0])[0] || 0);
  const fill = () => {
    const wanted = selects.map((select) => select.value);
    all("th", head).forEach((th) => th.removeAttribute("aria-sort"));
    body.replaceChildren(...spec.rows
      .filter(([values]) => values.every((value, i) => !wanted[i] || value === wanted[i]))
      .sort((a, b) => size(b) - size(a))
      .map(([, cells]) => element("tr", {}, ...cells.map((cell, i) => boardCell(spec.columns[i], cell, i === 0 ? spec.notes[cell] : "")))));
  };
  const selects = spec.filters.map((filter) => {
    const select = element("select", { onchange: fill }, ...filter.options.map(([value, label]) => element("option", { value, textContent: label })));
    select.value = filter.first;
    select.dataset.filter = filter.key;
    board.querySelector(".controls").append(element("label", {}, filter.label + " ", select));
    return select;
  });
  fill();
});
